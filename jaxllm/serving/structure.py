"""The form that an answer must have, from all that a request says of it."""

import dataclasses
from collections.abc import Mapping

from jaxllm.core.structured_outputs import KINDS, StructuredOutputsParams
from jaxllm.serving.errors import refuse
from jaxllm.serving.forms import ANY_TEXT, Form, Mark, form_of, optional, params_of, regex, sequence, tag
from jaxllm.serving.protocol.common import Sampling
from jaxllm.serving.reasoning import ReasoningStyle, Stage


@dataclasses.dataclass(frozen=True)
class Structure:
    """A form that was asked for.

    Attributes:
      field: what the client calls it.
    """

    params: StructuredOutputsParams
    field: str

    @property
    def form(self) -> Form:
        """As a part of a larger one."""
        return form_of(self.params, self.field)

    @property
    def names(self) -> Mapping[str, str]:
        """The client's names of what the engine may refuse."""
        if self.field.startswith("structured_outputs."):
            return {"structured_outputs.structural_tag": self.field}
        return dict.fromkeys(["structured_outputs", *(f"structured_outputs.{kind}" for kind in KINDS)], self.field)


def asked_structure(body: Sampling, field: str = "response_format") -> Structure | None:
    """What a request asks for by itself, tools aside. Raises ApiError if it does so twice."""
    found = None if body.response_format is None else body.response_format.params()
    if body.structured_outputs is None:
        return None if found is None else Structure(found, field)
    if found is not None:
        raise refuse("structured_outputs", "…", f"excludes {field}")
    params = body.structured_outputs.params()
    return Structure(params, f"structured_outputs.{params.kind}")


def whole(structure: Structure, form: Form) -> Structure:
    """The structure that goes by the same name, with another form."""
    return dataclasses.replace(structure, params=params_of(form))


def after_reasoning(form: Form, style: ReasoningStyle, stage: Stage, mark: Mark) -> Form:
    """The form for an answer that begins with reasoning, which is free: it holds for what follows.

    stage: where the prompt leaves the answer.
    """
    if stage == "after":
        return form
    space = regex("[ \\n]*")
    if stage == "inside":
        return sequence(tag({"type": "const_string", "value": ""}, ANY_TEXT, mark(style.end)), space, form)
    thought = sequence(space, tag(mark(style.start), ANY_TEXT, mark(style.end)), space)
    return sequence(optional(thought), form)

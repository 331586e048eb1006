"""The form that outputs must have: OpenAI's `response_format` and `text.format`, vLLM's `structured_outputs`."""

import json
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.errors import InvalidRequestError
from jaxllm.serving.protocol.base import Refusal, Strict, Text


def _params(**given: Any) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(**given)
    except InvalidRequestError as error:
        name = error.field.removeprefix("structured_outputs").removeprefix(".")
        where = {"field": name} if name else {}
        raise PydanticCustomError("form", "{limit}", {"limit": error.limit, "value": error.value, **where}) from None


class JsonSchema(Strict):
    """`response_format.json_schema`. The schema is enforced whether `strict` or not."""

    name: Text
    schema_: dict[str, Any] = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """`response_format`; structural_tag is vLLM's, of either kind."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    format: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ResponseFormat":
        given = {
            name for name in ("json_schema", "format", "structures", "triggers") if getattr(self, name) is not None
        }
        wanted: list[set[str]] = [set()]
        if self.type == "json_schema":
            wanted = [{"json_schema"}]
        elif self.type == "structural_tag":
            wanted = [{"format"}, {"structures", "triggers"}]
        if given not in wanted:
            needed = " or ".join(" and ".join(sorted(names)) or "nothing" for names in wanted)
            raise PydanticCustomError("form", "{type} goes with {needed}", {"type": self.type, "needed": needed})
        return self

    def params(self) -> StructuredOutputsParams | None:
        """For the engine; None for text."""
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.schema_)
        if self.type == "structural_tag":
            return StructuredOutputsParams(structural_tag=json.dumps(self.model_dump(exclude_none=True)))
        return None


class TextFormat(Strict):
    """`text.format` of a response."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: Text | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _fits(self) -> "TextFormat":
        whole = self.name is not None and self.schema_ is not None
        if self.type == "json_schema" and not whole:
            raise PydanticCustomError("form", "json_schema needs name and schema")
        if self.type != "json_schema" and (self.name, self.schema_, self.description, self.strict) != (None,) * 4:
            raise PydanticCustomError("form", "{type} goes with nothing else", {"type": self.type})
        return self

    def response_format(self) -> ResponseFormat:
        """The same of a chat."""
        if self.schema_ is None:
            return ResponseFormat(type=self.type)
        return ResponseFormat(type="json_schema", json_schema=JsonSchema(name=self.name or "", schema=self.schema_))


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`, see `StructuredOutputsParams`."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: Text | None = None
    REFUSED: ClassVar = {"_backend": Refusal("there is one backend")}

    @model_validator(mode="after")
    def _checked(self) -> "StructuredOutputs":
        self.params()
        return self

    def params(self) -> StructuredOutputsParams:
        """For the engine."""
        given = self.model_dump(by_alias=True)
        if isinstance(self.structural_tag, dict):
            given["structural_tag"] = json.dumps(self.structural_tag)
        return _params(**given)

"""Calls of a model whose own way of writing them no grammar follows, or is not known: JSON, as vLLM has it then."""

from collections.abc import Sequence

from jaxllm.serving.forms import Form, const, either, separated, sequence
from jaxllm.serving.parsing import CallArguments, CallStart, Event
from jaxllm.serving.tools.base import CallableTool, ToolParser, json_call
from jaxllm.serving.tools.mistral import MistralParser


class JsonCallsParser(MistralParser):
    """The answer is an array of {"name", "parameters"}."""

    special_tokens = False

    def __init__(self) -> None:
        super().__init__()
        self._state = self._after_marker

    @staticmethod
    def call_id() -> str:
        """As of most models."""
        return ToolParser.call_id()


def json_calls(tools: Sequence[CallableTool], many: bool) -> Form:
    """The form of an answer for `JsonCallsParser`."""
    call = either([json_call(tool, "parameters") for tool in tools])
    return sequence(const("["), separated(call, ", ", many), const("]"))


class NamedCallParser(ToolParser):
    """The answer is the arguments of the one call that was asked for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name: str | None = name

    def _feed(self, text: str, events: list[Event]) -> None:
        if self._name is not None and text:
            events.append(CallStart(0, self._name))
            self._name = None
        if text:
            events.append(CallArguments(0, text))

    def _finish(self, events: list[Event]) -> None:
        pass

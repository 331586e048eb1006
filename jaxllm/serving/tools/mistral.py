"""Mistral: [TOOL_CALLS] and an array of {"name", "arguments"}; since v11 [TOOL_CALLS]name{…} or name[ARGS]{…}."""

import secrets
import string
from collections.abc import Sequence

from jaxllm.serving.forms import Form, Mark, const, either, separated, sequence, tag, triggered
from jaxllm.serving.parsing import CallArguments, CallStart, Content, Event, MarkerScanner
from jaxllm.serving.tools.base import CallableTool, ToolParser, json_call
from jaxllm.serving.tools.json_scan import SPACE, CallScanner, ValueScanner

START, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
LONGEST_NAME = 256  # characters, with the call's id


class MistralParser(ToolParser):
    """See the module."""

    special_tokens = True

    def __init__(self) -> None:
        super().__init__()
        self._scanner = MarkerScanner(START)
        self._state = self._text
        self._call: CallScanner | None = None
        self._value = ValueScanner()
        self._name = ""
        self._index = 0

    def _feed(self, text: str, events: list[Event]) -> None:
        while text:
            text = self._state(text, events)

    def _text(self, text: str, events: list[Event]) -> str:
        before, marker, rest = self._scanner.feed(text)
        if before:
            events.append(Content(before))
        if marker is not None:
            self._state = self._after_marker
        return rest

    def _after_marker(self, text: str, events: list[Event]) -> str:
        rest = text.lstrip(SPACE)
        if rest.startswith("["):
            self._state = self._array
            return rest[1:]
        if rest:
            self._state, self._name = self._named, ""
        return rest

    def _array(self, text: str, events: list[Event]) -> str:
        if self._call is not None:
            rest = self._call.feed(text, events)
            if self._call.done:
                self._index += self._call.started
                self._call = None
            return rest
        rest = text.lstrip(SPACE + ",")
        if rest.startswith("{"):
            self._call = CallScanner(self._index)
            return rest
        if rest:
            self._state = self._text
            return rest.removeprefix("]") if rest[0] == "]" else rest
        return ""

    def _named(self, text: str, events: list[Event]) -> str:
        """A name up to the arguments' brace."""
        for position, character in enumerate(text):
            if character == "{":
                name = self._name + text[:position]
                name = name.strip(SPACE).removesuffix(ARGS).partition(CALL_ID)[0].strip(SPACE)
                if not name:
                    break
                events.append(CallStart(self._index, name))
                self._state, self._value = self._arguments, ValueScanner()
                return text[position:]
            if len(self._name) + position > LONGEST_NAME:
                break
        else:
            self._name += text
            return ""
        events.append(Content(START + self._name + text[: position + 1]))
        self._state = self._text
        return text[position + 1 :]

    def _arguments(self, text: str, events: list[Event]) -> str:
        end = self._value.end(text, 0)
        events.append(CallArguments(self._index, text[:end]))
        if end is None:
            return ""
        self._index += 1
        self._state = self._text
        return text[end:]

    def _finish(self, events: list[Event]) -> None:
        if self._call is not None:
            self._call.finish(events)
        if self._state == self._named:
            events.append(Content(START + self._name))
        held = self._scanner.flush()
        if held:
            events.append(Content(held))

    @staticmethod
    def call_id() -> str:
        """Nine letters and digits: Mistral's templates refuse others."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    @classmethod
    def calls(cls, tools: Sequence[CallableTool], mark: Mark, many: bool) -> Form:
        named = _named_calls(tools, mark)
        return tag(mark(START), _array(tools, many)) if named is None else separated(either(named), "", many)

    @classmethod
    def text_and_calls(cls, tools: Sequence[CallableTool], mark: Mark, many: bool) -> Form:
        named = _named_calls(tools, mark)
        if named is None:
            return triggered(mark(START), [tag(mark(START), _array(tools, many))], stop_after_first=True)
        return triggered(mark(START), named, stop_after_first=not many)

    @classmethod
    def calls_or(cls, answer: Form, tools: Sequence[CallableTool], mark: Mark, many: bool) -> Form:
        return either([cls.calls(tools, mark, many), answer])


def _array(tools: Sequence[CallableTool], many: bool) -> Form:
    call = either([json_call(tool, "arguments") for tool in tools])
    return sequence(const("["), separated(call, ", ", many), const("]"))


def _named_calls(tools: Sequence[CallableTool], mark: Mark) -> list[Form] | None:
    """A call of each as since v11, whose tokenizers have a token between name and arguments; None for others."""
    between = mark(ARGS)
    if between["type"] != "token":
        return None
    return [tag(mark(START), sequence(const(tool.name), between, tool.arguments)) for tool in tools]

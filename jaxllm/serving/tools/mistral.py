"""Mistral: [TOOL_CALLS] and an array of {"name", "arguments"}; since v11 [TOOL_CALLS]name{…} or name[ARGS]{…}."""

import json
import secrets
import string

from jaxllm.serving.parsing import CallArguments, CallStart, Content, Event, MarkerScanner
from jaxllm.serving.tools.base import ToolParser
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

    @staticmethod
    def forced(name: str | None) -> str:
        return f'{START}[{{"name": ' + ('"' if name is None else f'{json.dumps(name)}, "arguments": ')

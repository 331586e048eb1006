"""JSON looked at character by character as it streams in; values themselves are read by the `json` library."""

import json
from typing import Literal

from jaxllm.serving.parsing import CallArguments, CallStart, Content, Event

SPACE = " \t\r\n"
_BARE_ENDS = frozenset(",]}" + SPACE)


class ValueScanner:
    """Finds where one JSON value ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = self._escape = self._bare = self._begun = False

    def end(self, text: str, position: int) -> int | None:
        """The position after the value's end, None if it goes on; its text begins or goes on at `position`."""
        for at in range(position, len(text)):
            character = text[at]
            if self._string:
                if self._escape:
                    self._escape = False
                elif character == "\\":
                    self._escape = True
                elif character == '"':
                    self._string = False
                    if not self._depth:
                        return at + 1
            elif self._bare:
                if character in _BARE_ENDS:
                    return at
            elif character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
            elif not self._depth:
                self._bare = True
        return None


class CallScanner:
    """One call as a JSON object: {"name": …, "arguments": …}.

    Arguments are passed on as they come, in the model's own spelling, once the name is known. An object that is no call
    comes back as content.

    Args:
      index: of the call.
      lead: what stood before the object and belongs to the content if it is no call.
    """

    KEYS = frozenset({"name", "arguments", "parameters", "type", "id"})

    def __init__(self, index: int, lead: str = ""):
        self._index = index
        self._raw: list[str] = [lead]  # until the name is known
        self._phase: Literal["open", "key", "in_key", "colon", "value", "in_value", "done"] = "open"
        self._key = self._name = ""
        self._pieces: list[str] = []  # of the key or value that is being read
        self._waiting: list[str] = []  # arguments before the name
        self._scanner = ValueScanner()
        self._has_arguments = False
        self._quoted = False  # arguments written as a string that holds JSON
        self.started = self.failed = False

    @property
    def done(self) -> bool:
        """Whether the object has ended, or is none."""
        return self._phase == "done"

    def feed(self, text: str, events: list[Event]) -> str:
        """Takes text, adds events; what follows the object."""
        position = 0
        while position < len(text) and not self.done:
            position = self._step(text, position, events)
        if not self.started:
            self._raw.append(text[:position])
        if self.failed and not self.started:
            events.append(Content("".join(self._raw)))
        return text[position:]

    def _step(self, text: str, position: int, events: list[Event]) -> int:
        """Goes on from `position`; the next one."""
        character = text[position]
        if self._phase == "in_key":
            return self._read_key(text, position)
        if self._phase == "in_value":
            return self._read_value(text, position, events)
        if character in SPACE or (character == "," and self._phase == "key"):
            return position + 1
        if self._phase == "open" and character == "{":
            self._phase = "key"
        elif self._phase == "key" and character == '"':
            self._begin("in_key")
            return position
        elif self._phase == "key" and character == "}":
            self._close(events)
        elif self._phase == "colon" and character == ":":
            self._phase = "value"
        elif self._phase == "value":
            self._begin("in_value")
            self._quoted = character == '"'
            return position
        else:
            self._fail()
            return position
        return position + 1

    def _begin(self, phase: Literal["in_key", "in_value"]) -> None:
        self._phase, self._pieces, self._scanner = phase, [], ValueScanner()

    def _fail(self) -> None:
        self._phase, self.failed = "done", True

    def _read_key(self, text: str, position: int) -> int:
        end = self._scanner.end(text, position)
        self._pieces.append(text[position:end])
        if end is None:
            return len(text)
        self._phase, self._key = "colon", _string("".join(self._pieces)) or ""
        if self._key not in self.KEYS:
            self._fail()
        return end

    def _read_value(self, text: str, position: int, events: list[Event]) -> int:
        end = self._scanner.end(text, position)
        piece = text[position:end]
        if self._key in ("arguments", "parameters") and not self._quoted:
            self._has_arguments = True
            self._argue(piece, events)
        else:
            self._pieces.append(piece)
        if end is None:
            return len(text)
        self._phase = "key"
        if self._key == "name":
            name = _string("".join(self._pieces))
            if not name:
                self._fail()
                return end
            self._name = name
            if not self.started:
                self.started = True
                events.append(CallStart(self._index, name))
                self._argue("".join(self._waiting), events)
        elif self._key in ("arguments", "parameters") and self._quoted:
            self._has_arguments = True
            self._argue(_string("".join(self._pieces)) or "{}", events)
        return end

    def _argue(self, text: str, events: list[Event]) -> None:
        if not self.started:
            self._waiting.append(text)
        elif text:
            events.append(CallArguments(self._index, text))

    def _close(self, events: list[Event]) -> None:
        self._phase = "done"
        self.failed = not self.started
        if self.started and not self._has_arguments:
            events.append(CallArguments(self._index, "{}"))

    def finish(self, events: list[Event]) -> None:
        """The text has ended inside the object."""
        if not self.done and not self.started:
            events.append(Content("".join(self._raw)))
        self._phase = "done"


def _string(raw: str) -> str | None:
    """The string that a JSON string spells; None if it is none."""
    try:
        value = json.loads(raw)
        value.encode()
    except (ValueError, AttributeError):
        return None
    return value

"""Llama 3.2, Llama 4 and others: [name(key="value", n=3), other()]."""

import ast
import json
import re
from typing import Any

from jaxllm.serving.parsing import CallArguments, CallStart, Content, Event
from jaxllm.serving.tools.base import ToolParser

TAG, END_TAG = "<|python_start|>", "<|python_end|>"
_HEAD = re.compile(r"[\w.\s]*")
_CONSTANTS = {"true": True, "false": False, "null": None}
LONGEST_CALL = 1 << 20  # characters
LONGEST_LEAD = 64  # characters before the list


class PythonicParser(ToolParser):
    """See the module. A call's events come when it is complete, since its arguments must be rewritten as JSON."""

    def __init__(self) -> None:
        super().__init__()
        self._lead = ""  # what may be the beginning of the list
        self._state = self._before
        self._pieces: list[str] = []  # of the call that is being read
        self._size = self._depth = self._index = 0
        self._quote = ""
        self._escape = self._after_call = False

    def _feed(self, text: str, events: list[Event]) -> None:
        while text:
            text = self._state(text, events)

    def _before(self, text: str, events: list[Event]) -> str:
        self._lead += text[0]
        bare = self._lead.lstrip()
        if bare.removeprefix(TAG).lstrip() == "[":
            self._state = self._list
        elif len(self._lead) > LONGEST_LEAD or not _may_begin(bare):
            self._give_up(events)
        return text[1:]

    def _give_up(self, events: list[Event]) -> None:
        """What has been read since the last call is content, and so is what follows."""
        text = self._lead + "".join(self._pieces)
        self._lead, self._pieces, self._state = "", [], self._text
        if text:
            events.append(Content(text))

    def _text(self, text: str, events: list[Event]) -> str:
        events.append(Content(text))
        return ""

    def _list(self, text: str, events: list[Event]) -> str:
        for position, character in enumerate(text):
            if self._quote:
                if self._escape:
                    self._escape = False
                elif character == "\\":
                    self._escape = True
                elif character == self._quote:
                    self._quote = ""
            elif self._depth and character in "\"'":
                self._quote = character
            elif character in "([{" and (self._depth or character == "("):
                self._depth += 1
            elif self._depth and character in ")]}":
                self._depth -= 1
                if not self._depth:
                    self._add(text[: position + 1])
                    self._end_call(events)
                    return text[position + 1 :]
            elif not self._depth and character == "]" and self._index:
                self._state = self._tail
                return text[position + 1 :]
            elif not self._depth and not (_HEAD.fullmatch(character) or (character == "," and self._index)):
                self._add(text[: position + 1])
                self._give_up(events)
                return text[position + 1 :]
        self._add(text)
        if self._size > LONGEST_CALL:
            self._give_up(events)
        return ""

    def _add(self, text: str) -> None:
        self._pieces.append(text)
        self._size += len(text)

    def _end_call(self, events: list[Event]) -> None:
        call = _read("".join(self._pieces).strip(", \t\r\n"))
        if call is None:
            self._give_up(events)
            return
        events += [CallStart(self._index, call[0]), CallArguments(self._index, call[1])]
        self._index += 1
        self._pieces, self._size, self._lead = [], 0, ""

    def _tail(self, text: str, events: list[Event]) -> str:
        self._lead += text[0]
        if self._lead.lstrip() == END_TAG:
            self._lead, self._state = "", self._text
        elif not END_TAG.startswith(self._lead.lstrip()):
            self._pieces = []
            self._give_up(events)
        return text[1:]

    def _finish(self, events: list[Event]) -> None:
        if self._index and not "".join(self._pieces).strip(", \t\r\n"):
            self._pieces = []
        self._give_up(events)


def _read(text: str) -> tuple[str, str] | None:
    """A call's name and its arguments as JSON text; None if it is no call with literal keyword arguments."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        arguments: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                return None
            arguments[keyword.arg] = _literal(keyword.value)
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        written.encode()  # no half surrogate pairs
        return ast.unparse(call.func), written
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


class _Constants(ast.NodeTransformer):
    """JSON's names of constants as Python's."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id not in _CONSTANTS:
            raise ValueError(node.id)
        return ast.copy_location(ast.Constant(_CONSTANTS[node.id]), node)


def _literal(node: ast.expr) -> Any:
    return ast.literal_eval(_Constants().visit(node))


def _may_begin(lead: str) -> bool:
    """Whether a list may follow: nothing, the tag or a part of it, and white space."""
    return TAG.startswith(lead) or (lead.startswith(TAG) and not lead.removeprefix(TAG).strip())

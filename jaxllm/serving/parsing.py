"""What parsers of a model's text have in common: the events they bring, and markers found in a stream of text.

A parser is fed text in pieces, however it was cut, and brings events; each character is looked at a bounded number of
times. The events of any cut, adjacent texts joined, are the same.
"""

import dataclasses

from jaxllm.text.stop_strings import compile_stop_strings


@dataclasses.dataclass(slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclasses.dataclass(slots=True)
class Reasoning:
    """Text that the model thinks."""

    text: str


@dataclasses.dataclass(slots=True)
class CallStart:
    """The model calls a function; `index` counts the answer's calls."""

    index: int
    name: str


@dataclasses.dataclass(slots=True)
class CallArguments:
    """A piece of the call's arguments, as JSON text."""

    index: int
    text: str


Event = Content | Reasoning | CallStart | CallArguments


class MarkerScanner:
    """Finds markers in a stream of text; what may yet become one is held back."""

    def __init__(self, *markers: str):
        self._automaton = compile_stop_strings(markers)
        self._firsts = {marker[0] for marker in markers}
        self._node, self._held = 0, ""

    def feed(self, text: str) -> tuple[str, str | None, str]:
        """(text before the first marker, the marker or None, what follows it)."""
        if not self._held and self._firsts.isdisjoint(text):
            return text, None, ""
        automaton, node = self._automaton, self._node
        held = len(self._held)
        whole = self._held + text
        for position, character in enumerate(text, held + 1):
            node = automaton.step(node, character)
            if length := automaton.ends(node):
                self._node, self._held = 0, ""
                start = position - length
                return whole[:start], whole[start:position], whole[position:]
        self._node = node
        cut = len(whole) - automaton.hold(node)
        self._held = whole[cut:]
        return whole[:cut], None, ""

    def flush(self) -> str:
        """What is held back, at the end."""
        text, self._held, self._node = self._held, "", 0
        return text


class Trimmed:
    """Text without white space at either end, as it comes."""

    def __init__(self) -> None:
        self._begun = False
        self._space: list[str] = []

    def feed(self, text: str) -> str:
        """What may be shown now."""
        if not self._begun:
            text = text.lstrip()
        body = text.rstrip()
        shown = ""
        if body:
            shown = "".join(self._space) + body
            self._space, self._begun = [], True
        if len(body) < len(text):
            self._space.append(text[len(body) :])
        return shown

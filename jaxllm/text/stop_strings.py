"""Stop strings found in a stream of text, whatever its pieces."""

import functools
from collections.abc import Sequence


class StopStrings:
    """An Aho-Corasick automaton over a request's stop strings: every character is looked at once.

    Attributes:
      strings: what it finds.
    """

    def __init__(self, strings: Sequence[str]):
        """Builds the automaton; strings must not be empty."""
        self.strings = tuple(strings)
        self._next: list[dict[str, int]] = [{}]
        self._fail, self._depth, self._ends = [0], [0], [0]
        for string in strings:
            self._insert(string)
        # breadth first, so that a node's fallback is finished before the node
        queue = list(self._next[0].values())
        self._hold = [0] * len(self._next)
        for node in queue:
            back = self._fail[node]
            self._ends[node] = self._ends[node] or self._ends[back]
            # a node without children is a whole string, and only its suffixes may yet become one
            self._hold[node] = self._depth[node] if self._next[node] else self._hold[back]
            for character, child in self._next[node].items():
                self._fail[child] = self.step(back, character)
                queue.append(child)

    def _insert(self, string: str) -> None:
        node = 0
        for character in string:
            child = self._next[node].get(character)
            if child is None:
                child = self._next[node][character] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._depth.append(self._depth[node] + 1)
                self._ends.append(0)
            node = child
        self._ends[node] = len(string)

    def step(self, node: int, character: str) -> int:
        """The state after one more character."""
        while (child := self._next[node].get(character)) is None:
            if not node:
                return 0
            node = self._fail[node]
        return child

    def ends(self, node: int) -> int:
        """The length of the longest stop string that ends here; 0 for none."""
        return self._ends[node]

    def hold(self, node: int) -> int:
        """How many characters back from here may yet become a stop string."""
        return self._hold[node]


@functools.lru_cache(maxsize=64)
def compile_stop_strings(strings: tuple[str, ...]) -> StopStrings:
    """The automaton, shared by requests that ask for the same strings (the samples of one request do)."""
    return StopStrings(strings)


class StopChecker:
    """One stream's search. The first string to be complete ends it; of several, the one that began first.

    Attributes:
      matched: the stop string that was found, or None.
    """

    def __init__(self, strings: Sequence[str], include: bool = False):
        """Starts a search.

        Args:
          strings: the stop strings, none of them empty.
          include: keep the stop string in the text instead of cutting before it.
        """
        self._automaton = compile_stop_strings(tuple(strings))
        self._include = include
        self._node = 0
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, may_stop: bool = True) -> str:
        """The text that may be shown now: none of it can become part of a stop string.

        Args:
          text: what the stream goes on with; nothing is shown of it after a match.
          may_stop: False lets strings that become complete in `text` pass (before min_tokens).
        """
        if self.matched is not None:
            return ""
        automaton, node = self._automaton, self._node
        whole = self._held + text
        for position, character in enumerate(text, len(self._held) + 1):
            node = automaton.step(node, character)
            if may_stop and (length := automaton.ends(node)):
                start = position - length
                self.matched, self._held = whole[start:position], ""
                return whole[: position if self._include else start]
        self._node = node
        cut = len(whole) - automaton.hold(node)
        self._held = whole[cut:]
        return whole[:cut]

    def flush(self) -> str:
        """What was held back, when the stream has ended without a stop string."""
        text, self._held, self._node = self._held, "", 0
        return text

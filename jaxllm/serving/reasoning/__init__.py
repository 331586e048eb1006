"""Reasoning apart from the answer: models that think between two markers, by vLLM's names of their parsers."""

import dataclasses
from typing import Literal

from jaxllm.errors import ConfigError
from jaxllm.serving.parsing import Content, Event, MarkerScanner, Reasoning, Trimmed


@dataclasses.dataclass(frozen=True)
class ReasoningStyle:
    """How a family writes its reasoning.

    Attributes:
      start, end: its markers.
      open: the reasoning has begun even if neither the prompt nor the model wrote the start marker.
    """

    start: str
    end: str
    open: bool = False


Stage = Literal["before", "inside", "after"]  # of the reasoning

STYLES = {
    "deepseek_r1": ReasoningStyle("<think>", "</think>", open=True),
    "qwen3": ReasoningStyle("<think>", "</think>"),
    "glm45": ReasoningStyle("<think>", "</think>"),
    "deepseek_v3": ReasoningStyle("<think>", "</think>"),
    "hunyuan_a13b": ReasoningStyle("<think>", "</think>"),
    "ernie45": ReasoningStyle("<think>", "</think>", open=True),
    "minimax_m2": ReasoningStyle("<think>", "</think>", open=True),
    "mistral": ReasoningStyle("[THINK]", "[/THINK]"),
    "olmo3": ReasoningStyle("<think>", "</think>", open=True),
    "seed_oss": ReasoningStyle("<seed:think>", "</seed:think>", open=True),
}


def reasoning_style(name: str) -> ReasoningStyle:
    """The style of that name. Raises ConfigError for others."""
    if name not in STYLES:
        raise ConfigError(f"reasoning_parser={name!r}: must be one of {', '.join(sorted(STYLES))}")
    return STYLES[name]


def first_stage(style: ReasoningStyle, prompt: str) -> Stage:
    """Where an answer begins, by the end of its prompt."""
    tail = prompt[-200:].rstrip()
    if tail.endswith(style.end):
        return "after"
    return "inside" if tail.endswith(style.start) or style.open else "before"


class ReasoningParser:
    """One answer's text, parted into reasoning and content.

    Args:
      style: of the model.
      prompt: the rendered conversation: whether it ends inside the reasoning decides how the answer begins.
    """

    def __init__(self, style: ReasoningStyle, prompt: str):
        self._state = first_stage(style, prompt)
        self._start = style.start
        self._scanner = MarkerScanner(style.start, style.end)
        self._thought = Trimmed()
        self._lead = self._state == "after" or self._state == "inside"  # white space before the content is dropped
        self._space: list[str] = []  # before a start marker that may yet come

    def feed(self, text: str) -> list[Event]:
        """The events that this text settles."""
        events: list[Event] = []
        while text and self._state != "after":
            before, marker, text = self._scanner.feed(text)
            self._take(before, events)
            if self._state == "after":  # an answer that does not begin with reasoning has none
                rest = (marker or "") + text + ("" if marker else self._scanner.flush())
                self._content(rest, events)
                return events
            if marker == self._start:
                self._state, self._space, self._lead = "inside", [], True
            elif marker is not None:
                self._state = "after"
                self._lead = True
        if text:
            self._content(text, events)
        return events

    def _take(self, text: str, events: list[Event]) -> None:
        if self._state == "inside":
            shown = self._thought.feed(text)
            if shown:
                events.append(Reasoning(shown))
        elif text.strip():
            self._state = "after"
            self._content("".join(self._space) + text, events)
        else:
            self._space.append(text)

    def _content(self, text: str, events: list[Event]) -> None:
        if self._lead:
            text = text.lstrip()
        if text:
            self._lead = False
            events.append(Content(text))

    def finish(self) -> list[Event]:
        """What was held back, at the end of the text."""
        events: list[Event] = []
        held = self._scanner.flush()
        if held:
            self._take(held, events)
        elif self._state == "before" and self._space:
            events.append(Content("".join(self._space)))
        return events

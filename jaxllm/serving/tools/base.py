"""What parsers of tool calls have in common."""

import dataclasses
import json
import uuid
from collections.abc import Sequence

from jaxllm.serving.forms import Form, Mark, const, sequence
from jaxllm.serving.parsing import CallStart, Content, Event


@dataclasses.dataclass(frozen=True)
class CallableTool:
    """A function that may be called, and the form of its arguments, JSON."""

    name: str
    arguments: Form


def json_call(tool: CallableTool, key: str) -> Form:
    """{"name": …, KEY: …}"""
    return sequence(const(f'{{"name": {json.dumps(tool.name)}, "{key}": '), tool.arguments, const("}"))


class ToolParser:
    """One answer's text, parted into content and calls.

    A subclass gives `_feed` and `_finish`, which may bring any white space around calls as content: it is dropped here.

    Attributes:
      special_tokens: whether the format is written with special tokens, which then must not be skipped.
      markers: what is a special token of some models only.
    """

    special_tokens = False
    markers: Sequence[str] = ()

    def __init__(self) -> None:
        self.num_calls = 0
        self._space: list[str] = []  # held back: white space at the content's end goes if a call follows

    def feed(self, text: str) -> list[Event]:
        """The events that this text settles."""
        events: list[Event] = []
        self._feed(text, events)
        return self._trim(events)

    def finish(self) -> list[Event]:
        """What was held back, at the end of the text."""
        events: list[Event] = []
        self._finish(events)
        events = self._trim(events)
        if self._space and not self.num_calls:
            events.append(Content("".join(self._space)))
        self._space = []
        return events

    def _trim(self, events: list[Event]) -> list[Event]:
        kept: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                body = event.text.rstrip()
                if body:
                    kept.append(Content("".join(self._space) + body))
                    self._space = []
                if len(body) < len(event.text):
                    self._space.append(event.text[len(body) :])
            else:
                if isinstance(event, CallStart):
                    self.num_calls += 1
                    self._space = []
                kept.append(event)
        return kept

    def _feed(self, text: str, events: list[Event]) -> None:
        raise NotImplementedError

    def _finish(self, events: list[Event]) -> None:
        raise NotImplementedError

    @staticmethod
    def call_id() -> str:
        """A new call's id."""
        return f"call_{uuid.uuid4().hex[:24]}"

    @classmethod
    def calls(cls, tools: Sequence[CallableTool], mark: Mark, many: bool) -> Form | None:
        """The form of an answer that is a call of one of the tools, or (many) several; None if no grammar has it."""
        return None

    @classmethod
    def text_and_calls(cls, tools: Sequence[CallableTool], mark: Mark, many: bool) -> Form | None:
        """The form of an answer in which the model may call the tools, or not; None if no grammar has it."""
        return None

    @classmethod
    def calls_or(cls, answer: Form, tools: Sequence[CallableTool], mark: Mark, many: bool) -> Form | None:
        """The form of an answer that is either calls or of another form; None if they cannot be told apart."""
        return None

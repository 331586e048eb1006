"""What parsers of tool calls have in common."""

import uuid

from jaxllm.serving.parsing import CallStart, Content, Event


class ToolParser:
    """One answer's text, parted into content and calls.

    A subclass gives `_feed` and `_finish`, which may bring any white space around calls as content: it is dropped here.

    Attributes:
      special_tokens: whether the format is written with special tokens, which then must not be skipped.
    """

    special_tokens = False

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

    @staticmethod
    def forced(name: str | None) -> str:
        """The beginning of an answer that calls a function: the one of that name, or any. It goes into the prompt."""
        raise NotImplementedError

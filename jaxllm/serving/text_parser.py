"""One answer's text through the reasoning parser and the parser of tool calls."""

from jaxllm.serving.parsing import Content, Event
from jaxllm.serving.reasoning import ReasoningParser
from jaxllm.serving.tools.base import ToolParser


class TextParser:
    """Feeds text to both."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None):
        self._reasoning, self._tools = reasoning, tools

    @property
    def calls(self) -> int:
        """How many calls there have been."""
        return 0 if self._tools is None else self._tools.num_calls

    def call_id(self) -> str:
        """A new call's id, as the model's template wants it."""
        return ToolParser.call_id() if self._tools is None else self._tools.call_id()

    def feed(self, text: str) -> list[Event]:
        """The events that this text settles."""
        events: list[Event] = [Content(text)] if text else []
        if self._reasoning is not None and text:
            events = self._reasoning.feed(text)
        return self._through_tools(events)

    def finish(self) -> list[Event]:
        """What was held back, at the end of the text."""
        events = self._through_tools(self._reasoning.finish()) if self._reasoning is not None else []
        return events + (self._tools.finish() if self._tools is not None else [])

    def _through_tools(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return events
        found: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                found += self._tools.feed(event.text)
            else:
                found.append(event)
        return found

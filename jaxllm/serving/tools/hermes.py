"""Hermes, Qwen 2.5 and Qwen 3: <tool_call>{"name": …, "arguments": {…}}</tool_call>."""

from collections.abc import Sequence

from jaxllm.serving.forms import Form, Mark, const, either, separated, sequence, tag, triggered
from jaxllm.serving.parsing import Content, Event, MarkerScanner
from jaxllm.serving.tools.base import CallableTool, ToolParser, json_call
from jaxllm.serving.tools.json_scan import CallScanner

START, END = "<tool_call>", "</tool_call>"


class HermesParser(ToolParser):
    """See the module."""

    markers = (START, END)

    def __init__(self) -> None:
        super().__init__()
        self._scanner = MarkerScanner(START, END)
        self._call: CallScanner | None = None
        self._index = 0
        self._closing = False  # after a call, before its end marker: white space there is none of the content
        self._no_call = False  # what stood after the start marker was none: its end marker is text too

    def _feed(self, text: str, events: list[Event]) -> None:
        while text:
            if self._call is not None:
                text = self._call.feed(text, events)
                if self._call.done:
                    self._index += self._call.started
                    self._no_call = self._call.failed
                    self._closing, self._call = not self._call.failed, None
                continue
            before, marker, text = self._scanner.feed(text)
            if self._closing:
                before = before.lstrip()
            if before:
                events.append(Content(before))
                self._closing = False
            if marker is not None:
                self._closing = False
            if marker == START:
                self._call = CallScanner(self._index, START)
            elif marker == END and self._no_call:
                events.append(Content(END))
                self._no_call = False

    def _finish(self, events: list[Event]) -> None:
        if self._call is not None:
            self._call.finish(events)
        held = self._scanner.flush()
        if held and not (self._closing and END.startswith(held)):  # of a call's end that was cut short
            events.append(Content(held))

    @classmethod
    def calls(cls, tools: Sequence[CallableTool], mark: Mark, many: bool) -> Form:
        return separated(either(_calls(tools, mark)), "\n", many)

    @classmethod
    def text_and_calls(cls, tools: Sequence[CallableTool], mark: Mark, many: bool) -> Form:
        return triggered(mark(START), _calls(tools, mark), stop_after_first=not many)

    @classmethod
    def calls_or(cls, answer: Form, tools: Sequence[CallableTool], mark: Mark, many: bool) -> Form:
        return either([cls.calls(tools, mark, many), answer])


def _calls(tools: Sequence[CallableTool], mark: Mark) -> list[Form]:
    """A call of each."""
    return [
        tag(mark(START), sequence(const("\n"), json_call(tool, "arguments"), const("\n")), mark(END)) for tool in tools
    ]

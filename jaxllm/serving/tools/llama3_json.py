"""Llama 3.1 and later: the answer is {"name": …, "parameters": {…}}, or several with ";" between them."""

from collections.abc import Sequence

from jaxllm.serving.forms import Form, Mark, either, optional, regex, separated, sequence
from jaxllm.serving.parsing import Content, Event
from jaxllm.serving.tools.base import CallableTool, ToolParser, json_call
from jaxllm.serving.tools.json_scan import SPACE, CallScanner

TAG = "<|python_tag|>"
LONGEST_LEAD = 64  # characters before an object
NO_CALL = r"\s*(?:[^\s{<](?s:.*)|<(?:[^|](?s:.*))?)?"  # text that begins neither with an object nor with the tag


class Llama3JsonParser(ToolParser):
    """See the module. An answer that does not begin with an object, or the tag, is content throughout."""

    def __init__(self) -> None:
        super().__init__()
        self._call: CallScanner | None = None
        self._between = ""  # before an object that may yet begin
        self._plain = False
        self._index = 0

    def _feed(self, text: str, events: list[Event]) -> None:
        while text and not self._plain:
            if self._call is not None:
                text = self._call.feed(text, events)
                if self._call.done:
                    self._plain, self._call = self._call.failed, None
                continue
            self._between += text[0]
            text = text[1:]
            lead = self._between.lstrip(SPACE + (";" if self._index else ""))
            if lead.removeprefix(TAG).lstrip(SPACE) == "{":
                self._call = CallScanner(self._index, self._between[:-1])
                self._index += 1
                self._between, text = "", "{" + text
            elif len(self._between) > LONGEST_LEAD or not _may_begin(lead):
                self._give_up(events)
        if text:
            events.append(Content(text))

    def _give_up(self, events: list[Event]) -> None:
        self._plain = True
        events.append(Content(self._between))
        self._between = ""

    def _finish(self, events: list[Event]) -> None:
        if self._call is not None:
            self._call.finish(events)
        if self._between and not self._plain:
            events.append(Content(self._between if not self._index else self._between.strip(SPACE + ";")))

    @classmethod
    def calls(cls, tools: Sequence[CallableTool], mark: Mark, many: bool) -> Form:
        return separated(either([json_call(tool, "parameters") for tool in tools]), "; ", many)

    @classmethod
    def text_and_calls(cls, tools: Sequence[CallableTool], mark: Mark, many: bool) -> Form:
        return either([sequence(optional(mark(TAG)), cls.calls(tools, mark, many)), regex(NO_CALL)])


def _may_begin(lead: str) -> bool:
    """Whether an object may follow: nothing, the tag or a part of it, and white space."""
    return TAG.startswith(lead) or (lead.startswith(TAG) and not lead.removeprefix(TAG).strip(SPACE))

"""Deltas to the items and events of /v1/responses."""

import time
import uuid
from typing import Any

from jaxllm.errors import InvalidRequestError
from jaxllm.frontend.outputs import CompletionOutput
from jaxllm.serving.chat import FieldNames, PreparedChat, prepare
from jaxllm.serving.context import Context
from jaxllm.serving.errors import ApiError, api_error
from jaxllm.serving.logprobs import LogprobFormat
from jaxllm.serving.parsing import CallStart, Content, Event, Reasoning
from jaxllm.serving.protocol.responses import LOGPROBS, ResponsesRequest
from jaxllm.serving.services import Services
from jaxllm.serving.streaming import encode as to_json

FIELDS = FieldNames("text.format", "tools[{}].parameters")
NAMES = {"max_tokens": "max_output_tokens", "messages": "input", "max_completion_tokens": "max_output_tokens"}


async def respond_to(services: Services, context: Context, body: ResponsesRequest) -> "ResponsesAnswer":
    """An answer whose generation has not been started. Raises ApiError or any of jaxllm.errors."""
    if body.top_logprobs is not None and LOGPROBS not in (body.include or ()):
        raise ApiError(400, f"top_logprobs={body.top_logprobs}: needs include=[{LOGPROBS!r}]", "top_logprobs")
    try:
        prepared = await prepare(services, context, body.chat(), FIELDS)
    except InvalidRequestError as error:
        raise api_error(error, NAMES) from error
    return ResponsesAnswer(services, context, body, prepared)


class ResponsesAnswer:
    """See `streaming.Answer`. One item is open at a time: reasoning, a message or a call."""

    def __init__(self, services: Services, context: Context, body: ResponsesRequest, prepared: PreparedChat):
        self.generation, self.stream = prepared.generation, bool(body.stream)
        self._parser = prepared.text_parser()
        self._one_call = body.parallel_tool_calls is False
        self._logprobs: list[dict[str, Any]] = []  # not shown yet
        self._kept: list[dict[str, Any]] = []  # of the open message
        self._wants_logprobs = LOGPROBS in (body.include or ())
        self._format = LogprobFormat(services.llm.builder.tokenizer, body.top_logprobs or 0, False)
        self._pieces: list[str] = []  # of the open item
        self._items: list[dict[str, Any]] = []
        self._open = False
        self._sequence = 0
        self._reasoning_tokens = 0  # of deltas that brought reasoning
        text = body.text.format if body.text is not None else None
        choice = body.tool_choice or "auto"
        if choice.startswith("function:"):
            choice = {"type": "function", "name": choice.removeprefix("function:")}
        self._response: dict[str, Any] = {
            "id": f"resp_{body.request_id or context.request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": prepared.model,
            "output": self._items,
            "parallel_tool_calls": not self._one_call,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": body.temperature,
            "text": {"format": text.model_dump(by_alias=True, exclude_none=True) if text else {"type": "text"}},
            "tool_choice": choice,
            "tools": [{**tool.model_dump(), "strict": bool(tool.strict)} for tool in body.tools or []],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    # Events

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = to_json({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    def begin(self) -> bytes:
        created = self._event("response.created", response=self._response)
        return created + self._event("response.in_progress", response=self._response)

    def events(self, index: int, delta: CompletionOutput) -> bytes:
        if self._wants_logprobs and delta.logprobs is not None:
            self._logprobs += self._format.chat(delta.token_ids, delta.logprobs)["content"]
        if self._parser is None:
            events: list[Event] = [Content(delta.text)] if delta.text else []
        else:
            events = self._parser.feed(delta.text)
            if delta.finished:
                events += self._parser.finish()
        if any(isinstance(event, Reasoning) for event in events):
            self._reasoning_tokens += len(delta.token_ids)
        data = b"".join([self._take(event) for event in events])
        if delta.finish_reason is not None:
            data += self._finish(delta.finish_reason)
        return data

    def _take(self, event: Event) -> bytes:
        if isinstance(event, Content):
            opened = self._begin_text("message") if not self._is_open("message") else b""
            return opened + self._text_delta("response.output_text.delta", event.text)
        if isinstance(event, Reasoning):
            opened = self._begin_text("reasoning") if not self._is_open("reasoning") else b""
            return opened + self._text_delta("response.reasoning_text.delta", event.text)
        if event.index and self._one_call:
            return b""
        if isinstance(event, CallStart):
            return self._begin_call(event.name)
        self._pieces.append(event.text)
        return self._event("response.function_call_arguments.delta", **self._place(), delta=event.text)

    def _is_open(self, kind: str) -> bool:
        return self._open and self._items[-1]["type"] == kind

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _add(self, item: dict[str, Any]) -> bytes:
        closed = self._close("completed")
        self._items.append(item)
        self._open, self._pieces = True, []
        return closed + self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _begin_text(self, kind: str) -> bytes:
        item: dict[str, Any] = {"type": kind, "id": _id("msg" if kind == "message" else "rs"), "status": "in_progress"}
        item |= {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
        added = self._add(item)
        return added + self._event(
            "response.content_part.added", **self._place(), content_index=0, part=self._part("", [])
        )

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._items[-1]["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _text_delta(self, kind: str, text: str) -> bytes:
        self._pieces.append(text)
        fields: dict[str, Any] = {"content_index": 0, "delta": text}
        if kind == "response.output_text.delta":
            fields["logprobs"], self._logprobs = self._logprobs, []
            self._kept += fields["logprobs"]
        return self._event(kind, **self._place(), **fields)

    def _begin_call(self, name: str) -> bytes:
        call_id = self._parser.call_id() if self._parser is not None else _id("call")
        item = {"type": "function_call", "id": _id("fc"), "call_id": call_id, "name": name}
        return self._add({**item, "arguments": "", "status": "in_progress"})

    def _close(self, status: str) -> bytes:
        """Ends the open item."""
        if not self._open:
            return b""
        self._open = False
        item, text, place = self._items[-1], "".join(self._pieces), self._place()
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            done = "response.function_call_arguments.done"
            data = self._event(done, **place, name=item["name"], arguments=text)
        else:
            part = self._part(text, self._kept)
            item["content"] = [part]
            at = {**place, "content_index": 0}
            if item["type"] == "message":
                part["logprobs"] = self._kept = self._kept + self._logprobs
                self._logprobs = []
                data = self._event("response.output_text.done", **at, text=text, logprobs=self._kept)
                self._kept = []
            else:
                data = self._event("response.reasoning_text.done", **at, text=text)
            data += self._event("response.content_part.done", **at, part=part)
        return data + self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _finish(self, reason: str) -> bytes:
        whole = reason == "stop"
        data = self._close("completed" if whole else "incomplete")
        self._response["status"] = "completed" if whole else "incomplete"
        if not whole:
            limit = "max_output_tokens" if reason == "length" else "content_filter"
            self._response["incomplete_details"] = {"reason": limit}
        return data

    def end(self) -> bytes:
        self._set_usage()
        kind = f"response.{self._response['status']}"
        return self._event(kind, response=self._response)

    def error(self, error: ApiError) -> bytes:
        return self._event("error", code=error.code, message=error.message, param=error.param)

    # Whole

    def add(self, index: int, delta: CompletionOutput) -> None:
        self.events(index, delta)

    def body(self) -> dict[str, Any]:
        self._set_usage()
        return self._response

    def _set_usage(self) -> None:
        usage = self.generation.usage
        self._response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            # What is written is a matter of prices, and nothing is charged for it here.
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"

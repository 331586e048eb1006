"""Deltas to chat completions, whole or as chunks."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from jaxllm.frontend.outputs import CompletionOutput
from jaxllm.serving.errors import ApiError
from jaxllm.serving.generation import Generation
from jaxllm.serving.logprobs import LogprobFormat, prompt_logprobs
from jaxllm.serving.parsing import CallArguments, CallStart, Content, Event, Reasoning
from jaxllm.serving.services import Services
from jaxllm.serving.streaming import DONE, event
from jaxllm.serving.streaming import encode as to_json
from jaxllm.serving.text_parser import TextParser


@dataclasses.dataclass
class Wishes:
    """How the answer is wanted.

    Attributes:
      logprobs: alternatives a position; None for no logprobs at all.
      as_ids: show tokens as "token_id:17".
      token_ids: with the ids of prompt and output.
      usage, usage_always: usage at a stream's end, in every chunk.
      reasoning: show the reasoning.
      one_call: no more than one tool call.
      named: the call was asked for by name.
    """

    request_id: str
    stream: bool
    logprobs: int | None
    as_ids: bool
    token_ids: bool
    prompt_logprobs: bool
    usage: bool
    usage_always: bool
    reasoning: bool
    one_call: bool
    named: bool


class Choice:
    """One choice as it grows."""

    def __init__(self, parser: TextParser | None):
        self.parser = parser
        self.begun = False
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.logprobs: list = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.prompt_logprobs: list | None = None

    def parse(self, delta: CompletionOutput) -> list[Event]:
        """The delta's events."""
        if self.parser is None:
            return [Content(delta.text)] if delta.text else []
        events = self.parser.feed(delta.text)
        return events + self.parser.finish() if delta.finished else events

    def reason(self, delta: CompletionOutput, named: bool) -> str | None:
        """The finish reason: calls that the model made by itself are one of their own."""
        called = self.parser is not None and self.parser.calls and not named
        return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason


class ChatAnswer:
    """See `streaming.Answer`."""

    def __init__(
        self,
        services: Services,
        model: str,
        wishes: Wishes,
        prompt: list[int],
        generation: Generation,
        parser: Callable[[], TextParser | None],
    ):
        self._wishes, self._prompt = wishes, prompt
        self.generation, self.stream = generation, wishes.stream
        self._format = LogprobFormat(services.llm.builder.tokenizer, wishes.logprobs or 0, wishes.as_ids)
        self._choices = [Choice(parser()) for _ in range(generation.num_choices)]
        self._head = {
            "id": f"chatcmpl-{wishes.request_id}",
            "object": "chat.completion.chunk" if wishes.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
        }
        # Most deltas differ in nothing but their text.
        self._plain = self._choices[0].parser is None and wishes.logprobs is None
        self._plain = self._plain and not (wishes.token_ids or wishes.usage_always)
        lead = to_json(self._head)[:-1]
        self._leads = [
            b'data: %b,"choices":[{"index":%d,"delta":{"content":' % (lead, index)
            for index in range(generation.num_choices)
        ]

    # Streams

    def begin(self) -> bytes:
        return b"".join(
            self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self.generation.num_choices)
        )

    def events(self, index: int, delta: CompletionOutput) -> bytes:
        if self._plain and delta.finish_reason is None:
            if not delta.text:
                return b""
            text = to_json(delta.text)
            return b'%b%b},"logprobs":null,"finish_reason":null}]}\n\n' % (self._leads[index], text)
        choice, wishes = self._choices[index], self._wishes
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs or ()
        pieces = [piece for item in choice.parse(delta) if (piece := self._delta(choice, item)) is not None]
        told = choice.parser is None and choice.token_ids and (choice.logprobs or wishes.token_ids)
        if not pieces and (delta.finished or told):
            pieces = [{}]
        chunks = []
        for position, piece in enumerate(pieces):
            last = delta.finished and position == len(pieces) - 1
            # logprobs and ids go with the first piece after their tokens
            chunks.append(self._chunk(index, piece, delta if last else None, choice))
        return b"".join(chunks)

    def _delta(self, choice: Choice, item: Event) -> dict[str, Any] | None:
        """An event as a chunk's `delta`; None if it is not to be shown."""
        wishes = self._wishes
        if isinstance(item, Content):
            return {"content": item.text}
        if isinstance(item, Reasoning):
            return {"reasoning": item.text, "reasoning_content": item.text} if wishes.reasoning else None
        if item.index and wishes.one_call:
            return None
        if isinstance(item, CallStart):
            assert choice.parser is not None
            function = {"name": item.name, "arguments": ""}
            call = {"index": item.index, "id": choice.parser.call_id(), "type": "function", "function": function}
        else:
            call = {"index": item.index, "function": {"arguments": item.text}}
        return {"tool_calls": [call]}

    def _chunk(
        self, index: int, piece: dict[str, Any], end: CompletionOutput | None = None, choice: Choice | None = None
    ) -> bytes:
        wishes = self._wishes
        data: dict[str, Any] = {"index": index, "delta": piece, "logprobs": None, "finish_reason": None}
        if choice is not None:
            if choice.logprobs:
                data["logprobs"] = self._format.chat(choice.token_ids, choice.logprobs)
            if wishes.token_ids:
                data["token_ids"] = choice.token_ids
            choice.token_ids, choice.logprobs = [], []
            if end is not None:
                data["finish_reason"] = choice.reason(end, wishes.named)
                data["stop_reason"] = end.stop_reason
        body: dict[str, Any] = {**self._head, "choices": [data]}
        if wishes.token_ids and choice is None:
            body["prompt_token_ids"] = self._prompt
        if wishes.usage_always:
            body["usage"] = self.generation.usage.json()
        return event(body)

    def end(self) -> bytes:
        body: dict[str, Any] = {**self._head, "choices": [], "usage": self.generation.usage.json()}
        return (event(body) if self._wishes.usage else b"") + DONE

    def error(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    # Whole

    def add(self, index: int, delta: CompletionOutput) -> None:
        choice = self._choices[index]
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs or ()
        if delta.prompt_logprobs is not None:
            choice.prompt_logprobs = delta.prompt_logprobs
        for item in choice.parse(delta):
            if isinstance(item, Content):
                choice.content.append(item.text)
            elif isinstance(item, Reasoning):
                choice.reasoning.append(item.text)
            elif isinstance(item, CallStart):
                assert choice.parser is not None
                function = {"name": item.name, "arguments": ""}
                choice.calls.append({"id": choice.parser.call_id(), "type": "function", "function": function})
            elif isinstance(item, CallArguments):
                choice.calls[item.index]["function"]["arguments"] += item.text
        choice.finish_reason, choice.stop_reason = choice.reason(delta, self._wishes.named), delta.stop_reason

    def body(self) -> dict[str, Any]:
        wishes = self._wishes
        choices = []
        for index, choice in enumerate(self._choices):
            calls = choice.calls[:1] if wishes.one_call else choice.calls
            content = "".join(choice.content)
            message: dict[str, Any] = {
                "role": "assistant",
                "content": None if calls and not content else content,
                "refusal": None,
            }
            if calls:
                message["tool_calls"] = calls
            if choice.reasoning and wishes.reasoning:
                message["reasoning"] = message["reasoning_content"] = "".join(choice.reasoning)
            data = {
                "index": index,
                "message": message,
                "logprobs": None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            if wishes.logprobs is not None:
                data["logprobs"] = self._format.chat(choice.token_ids, choice.logprobs)
            if wishes.token_ids:
                data["token_ids"] = choice.token_ids
            choices.append(data)
        body: dict[str, Any] = {**self._head, "choices": choices, "usage": self.generation.usage.json()}
        if wishes.token_ids:
            body["prompt_token_ids"] = self._prompt
        if wishes.prompt_logprobs and self._choices[0].prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(self._choices[0].prompt_logprobs)
        return body

"""Completions: a request to prompts and parameters, deltas to answers."""

import time
from typing import Any

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.frontend.outputs import CompletionOutput
from jaxllm.serving.context import Context
from jaxllm.serving.errors import ApiError, refuse
from jaxllm.serving.generation import Generation
from jaxllm.serving.logprobs import LogprobFormat, prompt_logprobs
from jaxllm.serving.protocol.completions import CompletionRequest
from jaxllm.serving.sampling import check_length, encode, sampling_params, truncate
from jaxllm.serving.services import Services
from jaxllm.serving.streaming import DONE, event
from jaxllm.serving.streaming import encode as to_json
from jaxllm.serving.structure import Structure, asked_structure

DEFAULT_MAX_TOKENS = 16  # OpenAI's and vLLM's


async def complete(services: Services, context: Context, body: CompletionRequest) -> "CompletionAnswer":
    """An answer whose generation has not been started. Raises ApiError or any of jaxllm.errors."""
    model = services.model(body.model)
    structure = asked_structure(body)
    params = _params(services, body, structure)
    samples, most = len(body.prompt) * params.n, services.config.max_prompts
    if samples > most:
        limit = f"at most {most} prompts times samples (--max-prompts)"
        raise refuse("prompt", f"{len(body.prompt)} prompts, n={params.n}", limit)
    services.admission.check(samples)
    if isinstance(body.prompt[0], str):
        texts: list[str | None] = list(body.prompt)
        encoded = await encode(services, body.prompt, body.add_special_tokens is not False)
    else:
        texts, encoded = [None] * len(body.prompt), body.prompt
    prompts = [truncate(services, ids, body.truncate_prompt_tokens, params.max_tokens) for ids in encoded]
    for position, (ids, whole) in enumerate(zip(prompts, encoded, strict=True)):
        check_length(services, "prompt", body.prompt[position], ids)
        if len(ids) < len(whole):
            texts[position] = None
    generation = Generation(services, context, prompts, params, body.priority or 0, context.cache_salt(body.cache_salt))
    generation.names = {} if structure is None else structure.names
    return CompletionAnswer(services, context, body, model, params, prompts, texts, generation)


def _params(services: Services, body: CompletionRequest, structure: Structure | None) -> SamplingParams:
    own: dict[str, Any] = {"structured_outputs": None if structure is None else structure.params}
    own["max_tokens"] = body.max_tokens
    if body.max_tokens is None:
        own["max_tokens"] = services.llm.builder.default_params().max_tokens or DEFAULT_MAX_TOKENS
    if body.logprobs is not None:
        own["logprobs"] = body.logprobs
    if body.echo:
        if body.stream and body.logprobs is not None:
            raise refuse("echo", True, "cannot be streamed with logprobs")
        if body.max_tokens == 0:  # only to look at the prompt: one token is made, and dropped
            own["max_tokens"] = 1
            own["min_tokens"] = 0
        if body.logprobs is not None:
            own["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    return sampling_params(services, body, **own)


class _Choice:
    """One choice as it grows (for answers that are not streamed)."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.prompt_logprobs: list | None = None


class CompletionAnswer:
    """See `streaming.Answer`."""

    def __init__(
        self,
        services: Services,
        context: Context,
        body: CompletionRequest,
        model: str,
        params: SamplingParams,
        prompts: list[list[int]],
        texts: list[str | None],
        generation: Generation,
    ):
        self._body, self._n, self._prompts, self._texts = body, params.n, prompts, texts
        self.generation, self.stream = generation, bool(body.stream)
        self._tokenizer = services.llm.builder.tokenizer
        self._format = LogprobFormat(self._tokenizer, body.logprobs or 0, bool(body.return_tokens_as_token_ids))
        self._echo_only = bool(body.echo) and body.max_tokens == 0
        self._head = {
            "id": f"cmpl-{body.request_id or context.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._choices = [_Choice() for _ in range(generation.num_choices)]
        options = body.stream_options
        self._usage = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        # Most deltas differ in nothing but their text.
        self._plain = body.logprobs is None and not body.return_token_ids and not self._usage_always
        self._plain = self._plain and not self._echo_only
        lead = to_json(self._head)[:-1]
        self._leads = [
            b'data: %b,"choices":[{"index":%d,"text":' % (lead, index) for index in range(generation.num_choices)
        ]
        self._offsets = [0] * generation.num_choices
        self._begun = [False] * generation.num_choices

    def _prompt_text(self, index: int) -> str:
        text = self._texts[index // self._n]
        if text is None and self._tokenizer is not None:
            text = self._tokenizer.decode(self._prompts[index // self._n])
        return text or ""

    # Streams

    def begin(self) -> bytes:
        if not self._body.echo:
            return b""
        return b"".join(
            self._event(index, CompletionOutput(index, self._prompt_text(index)))
            for index in range(self.generation.num_choices)
        )

    def events(self, index: int, delta: CompletionOutput) -> bytes:
        if self._plain and delta.finish_reason is None and self._begun[index]:
            if not delta.text:
                return b""
            text = to_json(delta.text)
            return b'%b%b,"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n' % (self._leads[index], text)
        if self._echo_only:
            self.generation.usage.completion_tokens = 0
            return self._event(index, CompletionOutput(index, finish_reason="length")) if delta.finished else b""
        return self._event(index, delta)

    def _event(self, index: int, delta: CompletionOutput) -> bytes:
        logprobs = None
        if delta.logprobs is not None:
            logprobs, self._offsets[index] = self._format.completion(
                delta.token_ids, delta.logprobs, self._offsets[index]
            )
        choice: dict[str, Any] = {
            "index": index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if not self._begun[index]:
                choice["prompt_token_ids"] = self._prompts[index // self._n]
        self._begun[index] = True
        data: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._usage_always:
            data["usage"] = self.generation.usage.json()
        return event(data)

    def end(self) -> bytes:
        usage = event({**self._head, "choices": [], "usage": self.generation.usage.json()}) if self._usage else b""
        return usage + DONE

    def error(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    # Whole

    def add(self, index: int, delta: CompletionOutput) -> None:
        choice = self._choices[index]
        choice.texts.append(delta.text)
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs or ()
        if delta.prompt_logprobs is not None:
            choice.prompt_logprobs = delta.prompt_logprobs
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason

    def body(self) -> dict[str, Any]:
        if self._echo_only:
            self.generation.usage.completion_tokens = 0
        choices = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        return {**self._head, "choices": choices, "usage": self.generation.usage.json()}

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        body, prompt = self._body, self._prompts[index // self._n]
        if self._echo_only:
            choice.texts, choice.token_ids, choice.logprobs = [], [], []
            choice.finish_reason, choice.stop_reason = "length", None
        text, logprobs = "".join(choice.texts), None
        of_prompt = self._choices[index - index % self._n].prompt_logprobs  # the samples' are the same
        if body.logprobs is not None:
            tokens, positions = choice.token_ids, choice.logprobs
            if body.echo and of_prompt is not None:
                tokens, positions = prompt + tokens, of_prompt + positions
            logprobs, _ = self._format.completion(tokens, positions)
        if body.echo:
            text = self._prompt_text(index) + text
        data = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if body.prompt_logprobs is not None and of_prompt is not None:
            data["prompt_logprobs"] = prompt_logprobs(of_prompt)
        if body.return_token_ids:
            data |= {"prompt_token_ids": prompt, "token_ids": choice.token_ids}
        return data

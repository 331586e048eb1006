"""Offline generation: `LLM` runs the engine on the caller's thread."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.config import config_from
from jaxllm.core.expected import Expected
from jaxllm.core.pooling_params import PoolingParams
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine import heap
from jaxllm.engine.messages import Finish, StepOutputs, Utility, UtilityResult
from jaxllm.errors import EngineDeadError, InvalidRequestError
from jaxllm.frontend.collector import RequestCollector
from jaxllm.frontend.embedding import embedding_output
from jaxllm.frontend.engine import FrontEngine, Message, start_engine
from jaxllm.frontend.inputs import PreparedRequest, Prompt
from jaxllm.frontend.outputs import CompletionOutput, EmbeddingRequestOutput, RequestOutput
from jaxllm.frontend.progress import TokenProgress

if TYPE_CHECKING:
    from jaxllm.frontend.beam_search import BeamSearchOutput, BeamSearchParams

Params = SamplingParams | Sequence[SamplingParams] | None


@dataclasses.dataclass(slots=True)
class _News:
    """What a turn of the engine brought: tokens of all requests, and the sequence ids of those that ended."""

    num_tokens: int
    ended: list[str]


class LLM:
    """A model, ready to generate.

    Args:
      model: "smollm2" (the default model), a Hugging Face directory or id, or a .gguf file.
      expected: the first request, if it is known: what it needs is compiled first.
      progress: show progress bars.
      options: the fields of `jaxllm.config.EngineConfig`.

    Raises any of `jaxllm.errors`.
    """

    def __init__(
        self, model: str = "smollm2", *, expected: Expected | None = None, progress: bool = False, **options: Any
    ):
        config = config_from(str(model), options)
        self._engine: FrontEngine = start_engine(config, expected=expected, progress=progress)
        self._client, self._builder = self._engine.client, self._engine.builder
        self._collectors: dict[str, RequestCollector] = {}  # by sequence id
        self._open_lists: dict[str, list[int]] = {}  # of those that no stream reads, see RequestCollector.open_lists
        self._deltas: dict[str, list[CompletionOutput]] = {}  # of open streams, by request id
        self._calls = itertools.count()

    @property
    def config(self):
        """The options it was made with."""
        return self._engine.config

    @property
    def max_model_len(self) -> int:
        """Most tokens of one request, prompt and output."""
        return self._builder.limits.max_model_len

    def get_tokenizer(self):
        """The model's tokenizer. Raises InvalidRequestError if it has none."""
        return self._engine.tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can come in and go out: random weights may have none."""
        return self._builder.tokenizer is not None

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an output."""
        return self._builder.eos_token_ids

    def token_ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text, if it is one, and its token ids. Raises InvalidRequestError."""
        return self._builder.token_ids(prompt)

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams with the model's generation_config as defaults."""
        return self._builder.default_params()

    # Requests

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = False,
        priority: Sequence[int] | None = None,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Completes prompts, all at once; outputs stand in the prompts' order.

        Args:
          prompts: one prompt or several, each text or token ids.
          sampling_params: for all, or one for each; None means the model's defaults.
          use_tqdm: show progress and tokens/s.
          priority: one a prompt, lower first, under scheduling_policy="priority"; else they must be 0.
          cache_salt: prompts of different salts share no cached prefix.

        Raises:
          InvalidRequestError: any prompt or parameter is refused; then nothing has been started.
        """
        listed = _listed(prompts)
        params = list(_each(sampling_params, len(listed)))
        priorities = [0] * len(listed) if priority is None else list(priority)
        if len(priorities) != len(listed):
            raise InvalidRequestError("priority", priorities, f"{len(priorities)} for {len(listed)} prompts")
        prepared = [
            self._builder.build(prompt, p, priority=rank, cache_salt=cache_salt)
            for prompt, p, rank in zip(listed, params, priorities, strict=True)
        ]
        return [collector.snapshot() for collector in self._run(prepared, use_tqdm)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        use_tqdm: bool = False,
        priority: Sequence[int] | None = None,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """`generate` for one conversation or several, under the model's chat template or `chat_template` (Jinja)."""
        several = isinstance(messages, Sequence) and bool(messages) and not isinstance(messages, (str, bytes))
        several = several and not isinstance(messages[0], (Mapping, str))
        conversations: Any = messages if several else [messages]
        prompts = [
            self._engine.chat_prompt(conversation, tools, add_generation_prompt, chat_template_kwargs, chat_template)
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, priority=priority, cache_salt=cache_salt)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        output_token_ids: Sequence[int] = (),
    ) -> Iterator[CompletionOutput]:
        """Completes one prompt, or a conversation, and yields what is new as it comes (index tells which of n samples).

        Leaving the loop early aborts the request. `output_token_ids`: tokens already emitted, to go on after.
        """
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            prompt = self._engine.chat_prompt(prompt)  # type: ignore[arg-type]
        prepared = self._builder.build(prompt, sampling_params, output_token_ids=output_token_ids)  # type: ignore[arg-type]
        return self._stream(prepared)

    def _stream(self, prepared: PreparedRequest) -> Iterator[CompletionOutput]:
        collector = self._submit(prepared)
        deltas = self._deltas[prepared.request_id] = []
        try:
            while not collector.output.finished or deltas:
                if not deltas:
                    self._receive()
                if collector.error is None:
                    yield from _drain(deltas)
                deltas.clear()
            if collector.error is not None:
                raise collector.error
        finally:
            del self._deltas[prepared.request_id]
            self._withdraw([collector])

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = False,
        cache_salt: str = "",
    ) -> list[EmbeddingRequestOutput]:
        """One vector a prompt, see `PoolingParams`; in the prompts' order.

        Raises:
          InvalidRequestError: any prompt is refused; then nothing has been started.
          JaxllmError: the engine gave a prompt up.
        """
        params = pooling_params or PoolingParams()
        if not isinstance(params, PoolingParams):
            raise InvalidRequestError("pooling_params", params, "must be a PoolingParams")
        prepared = [self._builder.build(prompt, params, cache_salt=cache_salt) for prompt in _listed(prompts)]
        return [embedding_output(collector, params) for collector in self._run(prepared, use_tqdm)]

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: "BeamSearchParams") -> list["BeamSearchOutput"]:
        """The most likely continuations of prompts, see `jaxllm.frontend.beam_search`; in the prompts' order.

        Raises:
          InvalidRequestError: a prompt is refused, or leaves no room for max_tokens.
        """
        from jaxllm.frontend.beam_search import beam_search

        return beam_search(self, _listed(prompts), params)

    # The engine

    def warm_up(self) -> int:
        """Compiles everything that requests may need and waits for it; how many executables there are."""
        return self._call("warm_up")

    def stats(self) -> dict[str, Any]:
        """Figures of the engine: running, waiting, cache_usage, prefix hits, preemptions, steps, compilations."""
        return self._call("stats")

    def reset_prefix_cache(self) -> None:
        """Forgets cached prefixes."""
        self._call("reset_prefix_cache")

    def close(self) -> None:
        """Ends the engine."""
        self._client.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, name: str) -> Any:
        call = next(self._calls)
        self._client.send(Utility(call, name))
        answer: UtilityResult | None = None
        while answer is None:
            for message in self._client.receive(timeout=1.0):
                if isinstance(message, UtilityResult) and message.call == call:
                    answer = message
                elif isinstance(message, StepOutputs):
                    self._dispatch(message, _News(0, []))
        if answer.error is not None:
            raise RuntimeError(answer.error)
        return answer.value

    def _submit(self, prepared: PreparedRequest) -> RequestCollector:
        collector = RequestCollector(prepared, self._builder.tokenizer)
        for sequence in prepared.sequences:
            self._collectors[sequence.id] = collector
            self._client.send(sequence)
        return collector

    def _withdraw(self, collectors: Sequence[RequestCollector]) -> None:
        """Forgets requests and aborts what of them still runs."""
        ids = [sequence_id for c in collectors for sequence_id in c.sequence_ids if sequence_id in self._collectors]
        if ids:
            for sequence_id in ids:
                del self._collectors[sequence_id]
                self._open_lists.pop(sequence_id, None)
            with contextlib.suppress(EngineDeadError):
                self._client.send(Finish(ids))

    def _receive(self) -> "_News":
        """One turn of the engine."""
        news = _News(0, [])
        for message in self._client.receive(timeout=1.0):
            if isinstance(message, StepOutputs):
                self._dispatch(message, news)
        return news

    def _dispatch(self, message: StepOutputs, news: "_News") -> None:
        for output in message.outputs:
            collector = self._collectors.get(output.id)
            if collector is not None:
                self._hand_over(output.id, collector, collector.add(output), news)
            news.num_tokens += len(output.token_ids)
        open_list = self._open_lists.get
        for sequence_id, token in zip(message.ids, message.tokens, strict=True):
            tokens = open_list(sequence_id)
            if tokens is not None:
                tokens.append(token)
                continue
            collector = self._collectors.get(sequence_id)
            if collector is not None:
                self._hand_over(sequence_id, collector, collector.add_tokens(sequence_id, [token]), news)
        news.num_tokens += len(message.tokens)

    def _hand_over(
        self,
        sequence_id: str,
        collector: RequestCollector,
        delta: CompletionOutput | None,
        news: "_News",
    ) -> None:
        """Notes what is new of one sample, and tells the core if a stop string has ended it."""
        if delta is not None:
            if self._deltas and collector.output.request_id in self._deltas:
                self._deltas[collector.output.request_id].append(delta)
            if delta.finish_reason is not None:
                news.ended.append(sequence_id)
                del self._collectors[sequence_id]
                self._open_lists.pop(sequence_id, None)
        if collector.to_stop:
            self._client.send(Finish(collector.to_stop, reason="stop"))
            collector.to_stop = []

    def _run(self, prepared: list[PreparedRequest], show: bool) -> list[RequestCollector]:
        """Submits requests and turns the engine until all have ended. Raises what the core refuses one with."""
        collectors: list[RequestCollector] = []
        try:
            for request in prepared:
                collectors.append(self._submit(request))
                self._open_lists |= collectors[-1].open_lists()
            remaining = {sequence_id for collector in collectors for sequence_id in collector.sequence_ids}
            with TokenProgress(len(remaining), show) as progress, heap.frozen():
                while remaining:
                    news = self._receive()
                    ended = remaining.intersection(news.ended) if news.ended else ()
                    remaining.difference_update(ended)
                    progress.update(news.num_tokens, len(ended))
        finally:
            self._withdraw(collectors)
        for collector in collectors:
            if collector.error is not None:
                raise collector.error
        return collectors


def _drain(deltas: list[CompletionOutput]) -> Iterator[CompletionOutput]:
    while deltas:
        delta = deltas.pop(0)
        if delta.text or delta.token_ids or delta.finished:
            yield delta


def _listed(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list of prompts."""
    if isinstance(prompts, (str, bytes, Mapping)) or getattr(prompts, "ndim", None) == 1:
        return [prompts]
    if not isinstance(prompts, Sequence) and not hasattr(prompts, "tolist"):
        raise InvalidRequestError("prompts", prompts, "must be one prompt or a sequence of prompts")
    if len(prompts) and isinstance(prompts[0], int):
        return [prompts]
    return list(prompts)


def _each(params: Params, count: int) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError("sampling_params", len(params), f"must be one or {count}, one a prompt")
    return params

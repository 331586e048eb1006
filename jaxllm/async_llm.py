"""Online generation: `AsyncLLM` streams many requests at once from one event loop."""

import asyncio
import collections
import contextlib
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from jaxllm.config import EngineConfig, config_from
from jaxllm.core.pooling_params import PoolingParams
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine.messages import Finish, FromCore, SequenceOutput, StepOutputs, Utility, UtilityResult
from jaxllm.errors import ConfigError, EngineDeadError, InvalidRequestError, JaxllmError
from jaxllm.frontend.collector import RequestCollector
from jaxllm.frontend.embedding import embedding_output
from jaxllm.frontend.engine import FrontEngine, Message, start_engine
from jaxllm.frontend.inputs import PreparedRequest, Prompt
from jaxllm.frontend.outputs import CompletionOutput, EmbeddingRequestOutput, RequestOutput
from jaxllm.frontend.request_stream import RequestStream

logger = logging.getLogger(__name__)


class AsyncLLM:
    """A model served to coroutines of one event loop, the one that is running when it is made.

    Args:
      model, options: as in `LLM`; by default the engine core runs in a process of its own.
      max_concurrent_requests: `generate` waits (back-pressure) while so many requests are under way.
      engine: one that has been started already and that nobody else drives meanwhile, instead of model and options.
    """

    def __init__(
        self,
        model: str = "smollm2",
        *,
        max_concurrent_requests: int = 1024,
        engine: FrontEngine | None = None,
        **options: Any,
    ):
        if type(max_concurrent_requests) is not int or max_concurrent_requests < 1:
            raise ConfigError(f"max_concurrent_requests={max_concurrent_requests!r}: must be an integer of at least 1")
        if engine is not None and options:
            raise ConfigError(f"options {', '.join(options)}: the engine given has been started with its own")
        options.setdefault("engine_process", True)
        self._loop = asyncio.get_running_loop()
        self._engine: FrontEngine = engine or start_engine(config_from(str(model), options))
        self._client, self.builder = self._engine.client, self._engine.builder
        self._live: dict[str, RequestStream] = {}  # by sequence id
        self._requests: dict[str, RequestStream] = {}  # by request id
        self._most_running = max_concurrent_requests
        self._running: set[str] = set()  # requests that the engine has, by id
        self._waiting: dict[str, PreparedRequest] = {}  # the others
        self._utilities: dict[int, asyncio.Future] = {}
        self._inbox: collections.deque[FromCore] = collections.deque()
        self._called = False  # whether `_take` is about to look into it
        self._calls = itertools.count()
        self._dead: JaxllmError | None = None
        self._pump = threading.Thread(target=self._receive_forever, name="engine", daemon=True)
        self._pump.start()

    @property
    def max_model_len(self) -> int:
        """Most tokens of one request, prompt and output."""
        return self.builder.limits.max_model_len

    @property
    def config(self) -> EngineConfig:
        """The engine's options."""
        return self._engine.config

    @property
    def max_num_seqs(self) -> int:
        """Samples that run at once."""
        return self._client.ready.max_num_seqs

    @property
    def restarting(self) -> bool:
        """The engine's process has died, and another one is being started; requests wait meanwhile."""
        return self._client.restarting

    @property
    def num_restarts(self) -> int:
        """How often that has happened."""
        return self._client.num_restarts

    def live_output(self, request_id: str) -> RequestOutput | None:
        """What a request under way has brought so far, texts left out; None for one that is not."""
        stream = self._requests.get(request_id)
        return None if stream is None else stream.collector.output

    def get_tokenizer(self):
        """The model's tokenizer. Raises InvalidRequestError if it has none."""
        return self._engine.tokenizer

    def chat_prompt(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """The token ids of a conversation; options as in `LLM.chat`."""
        return self._engine.chat_prompt(messages, **options)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | PoolingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        output_token_ids: Sequence[int] = (),
    ) -> AsyncIterator[CompletionOutput]:
        """Completes one prompt; yields deltas (`index` tells which of n samples). Leaving early aborts the request.

        Raises:
          InvalidRequestError: before any work, naming the field.
          QueueFullError: too much waits already.
          EngineDeadError: the engine has ended.
        """
        stream = self.submit(
            prompt,
            sampling_params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            output_token_ids=output_token_ids,
        )
        try:
            while deltas := await stream.read():
                for delta in deltas:
                    yield delta
        finally:
            self.close_stream(stream)

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | PoolingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        output_token_ids: Sequence[int] = (),
    ) -> RequestStream:
        """As `generate`, at once, for a caller that reads the stream by itself: raises the same, here what is refused
        and from `RequestStream.read` the rest. Every stream must be given back to `close_stream`."""
        prepared = self.builder.build(
            prompt,
            sampling_params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            output_token_ids=output_token_ids,
        )
        if self._dead is not None:
            raise self._dead
        if prepared.request_id in self._requests:
            raise InvalidRequestError("request_id", prepared.request_id, "must be unique among live requests")
        stream = RequestStream(RequestCollector(prepared, self.builder.tokenizer))
        self._requests[prepared.request_id] = stream
        self._waiting[prepared.request_id] = prepared
        self._start_waiting()
        return stream

    def close_stream(self, stream: RequestStream) -> None:
        """Takes a request back, wherever it is: nothing comes of it any more. May be called again."""
        request_id = stream.collector.output.request_id
        if self._requests.get(request_id) is not stream:
            return
        del self._requests[request_id]
        self._waiting.pop(request_id, None)
        if request_id in self._running:
            self._running.remove(request_id)
            self._withdraw(stream.collector)
            self._start_waiting()

    def _start_waiting(self) -> None:
        """Hands requests to the engine, as they came, while it may have more."""
        while self._waiting and len(self._running) < self._most_running:
            request_id = next(iter(self._waiting))
            prepared, stream = self._waiting.pop(request_id), self._requests[request_id]
            self._running.add(request_id)
            try:
                for sequence in prepared.sequences:
                    self._live[sequence.id] = stream
                    self._client.send(sequence)
            except EngineDeadError as error:
                stream.fail(error)

    async def complete(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """`generate`, read to its end: the whole output."""
        return (await self._read_to_end(prompt, sampling_params, options)).snapshot()

    async def embed(
        self, prompt: Prompt, pooling_params: PoolingParams | None = None, **options: Any
    ) -> EmbeddingRequestOutput:
        """One prompt's vector, see `LLM.embed`; options as in `generate`. Cancelling it aborts the request."""
        params = pooling_params or PoolingParams()
        if not isinstance(params, PoolingParams):
            raise InvalidRequestError("pooling_params", params, "must be a PoolingParams")
        return embedding_output(await self._read_to_end(prompt, params, options), params)

    async def _read_to_end(
        self, prompt: Prompt, params: SamplingParams | PoolingParams | None, options: dict[str, Any]
    ) -> RequestCollector:
        if options.get("request_id") is None:
            options["request_id"] = f"complete-{next(self._calls)}"
        stream = self.submit(prompt, params, **options)
        try:
            while await stream.read():
                pass
        finally:
            self.close_stream(stream)
        return stream.collector

    async def abort(self, request_id: str) -> None:
        """Ends a request with finish_reason "abort"; unknown ids are ignored."""
        stream = self._requests.get(request_id)
        if stream is None:
            return
        if self._waiting.pop(request_id, None) is None:
            self._client.send(Finish(stream.collector.sequence_ids))
            return
        stream.collector.output.finished = True
        for sample in stream.collector.output.outputs:
            sample.finish_reason = "abort"
            stream.put(CompletionOutput(sample.index, finish_reason="abort"))

    async def stats(self) -> dict[str, Any]:
        """As in `LLM.stats`."""
        return await self._call("stats")

    async def warm_up(self) -> int:
        """As in `LLM.warm_up`."""
        return await self._call("warm_up")

    async def reset_prefix_cache(self) -> None:
        """As in `LLM.reset_prefix_cache`."""
        await self._call("reset_prefix_cache")

    async def _call(self, name: str) -> Any:
        if self._dead is not None:
            raise self._dead
        call = next(self._calls)
        future = self._utilities[call] = self._loop.create_future()
        self._client.send(Utility(call, name))
        return await future

    def close(self) -> None:
        """Ends the engine; requests under way raise EngineDeadError."""
        self._client.close()
        self._pump.join(timeout=10)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _withdraw(self, collector: RequestCollector) -> None:
        ids = [sequence_id for sequence_id in collector.sequence_ids if self._live.pop(sequence_id, None)]
        if ids and self._dead is None:
            with contextlib.suppress(EngineDeadError):
                self._client.send(Finish(ids))

    # The engine's thread

    def _receive_forever(self) -> None:
        try:
            while True:
                messages = self._client.receive(timeout=1.0)
                if messages:
                    self._inbox.extend(messages)
                    if not self._called:
                        self._called = True
                        self._loop.call_soon_threadsafe(self._take)
        except BaseException as error:
            death = error if isinstance(error, JaxllmError) else EngineDeadError(f"{type(error).__name__}: {error}")
            if not isinstance(error, JaxllmError):
                logger.exception("the engine has failed")
            with contextlib.suppress(RuntimeError):  # the event loop may have ended before the engine
                self._loop.call_soon_threadsafe(self._die, death)

    # The event loop's thread

    def _take(self) -> None:
        """Takes in all that has come. When that are several steps, the loop is behind: then a sequence's tokens are
        handled together, which costs little more than handling one."""
        self._called = False  # before looking: what comes later calls again
        tokens: dict[str, list[int]] = {}
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, StepOutputs):
                for output in message.outputs:
                    if output.id in tokens:
                        self._deliver(output.id, tokens.pop(output.id))
                    self._deliver(output.id, output)
                for sequence_id, token in zip(message.ids, message.tokens, strict=True):
                    if sequence_id in tokens:
                        tokens[sequence_id].append(token)
                    else:
                        tokens[sequence_id] = [token]
            elif isinstance(message, UtilityResult):
                future = self._utilities.pop(message.call)
                if future.done():
                    continue  # whoever asked has given up
                if message.error is None:
                    future.set_result(message.value)
                else:
                    future.set_exception(RuntimeError(message.error))
        for sequence_id, those in tokens.items():
            self._deliver(sequence_id, those)

    def _deliver(self, sequence_id: str, news: SequenceOutput | list[int]) -> None:
        stream = self._live.get(sequence_id)
        if stream is None:
            return
        try:
            collector = stream.collector
            delta = collector.add_tokens(sequence_id, news) if isinstance(news, list) else collector.add(news)
        except Exception as error:  # its fault alone: the others' outputs are in the same message
            logger.exception("request %s", sequence_id)
            stream.fail(JaxllmError(f"{type(error).__name__}: {error}"))
            return
        if delta is not None:
            if delta.finished:
                del self._live[sequence_id]
            stream.put(delta)
        if stream.collector.to_stop:
            with contextlib.suppress(EngineDeadError):  # whoever receives gets to know
                self._client.send(Finish(stream.collector.to_stop, reason="stop"))
            stream.collector.to_stop = []

    def _die(self, error: JaxllmError) -> None:
        self._dead = error
        for stream in self._requests.values():
            if not stream.collector.output.finished:
                stream.fail(error)
        self._live.clear()
        for future in self._utilities.values():
            if not future.done():
                future.set_exception(error)
        self._utilities.clear()

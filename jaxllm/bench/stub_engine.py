"""An engine without a model: what it would cost to serve if the engine cost nothing, and answers known beforehand."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping

from jaxllm.config import EngineConfig
from jaxllm.engine.messages import (
    AddRequest,
    Finish,
    FromCore,
    Ready,
    SequenceOutput,
    StepOutputs,
    ToCore,
    Utility,
    UtilityResult,
)
from jaxllm.errors import EngineDeadError
from jaxllm.frontend.engine import FrontEngine
from jaxllm.frontend.inputs import ModelLimits, RequestBuilder
from jaxllm.text.tokenizer import Tokenizer

Reply = Callable[[AddRequest], list[int]]
STATS = ("running", "waiting", "cache_usage", "preemptions", "steps", "late_compilations")


class StubClient:
    """Answers each request with the tokens of `reply`, one a step.

    Args:
      reply: a request's output, the token that ends it included.
      steps_per_second: None for as fast as the reader can.

    Attributes:
      loop: the reader's event loop; once set, a step is brought only when the one before has been dealt with.
      aborted: ids of requests that were ended from outside.
      asked, emitted: when each request was handed over and each step was brought, on the clock of time.perf_counter.
    """

    restarting, num_restarts = False, 0

    def __init__(self, ready: Ready, reply: Reply, steps_per_second: float | None = None):
        self.ready, self._reply = ready, reply
        self._interval = 1 / steps_per_second if steps_per_second else 0.0
        self._lock, self._wake = threading.Condition(), time.perf_counter()
        self._live: dict[str, tuple[AddRequest, list[int], int]] = {}
        self._outbox: list[FromCore] = []
        self._closed = False
        self.num_steps = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.aborted: list[str] = []
        self.asked: list[float] = []
        self.emitted: list[float] = []

    def send(self, message: ToCore) -> None:
        with self._lock:
            if self._closed:
                raise EngineDeadError("the engine has been closed")
            if isinstance(message, AddRequest):
                self.asked.append(time.perf_counter())
                self._live[message.id] = (message, self._reply(message), 0)
            elif isinstance(message, Finish):
                self.aborted += [name for name in message.ids if self._live.pop(name, None)]
            elif isinstance(message, Utility):
                stats = dict.fromkeys(STATS, 0) | {"running": len(self._live), "steps": self.num_steps}
                self._outbox.append(UtilityResult(message.call, stats if message.name == "stats" else 0))
            self._lock.notify()

    def receive(self, timeout: float) -> list[FromCore]:
        with self._lock:
            if not (self._live or self._outbox or self._closed):
                self._lock.wait(timeout)
            if self._closed:
                raise EngineDeadError("the engine has been closed")
            messages, self._outbox = self._outbox, []
            live = bool(self._live)
        if live:
            self._wake = max(self._wake + self._interval, time.perf_counter() - self._interval)
            time.sleep(max(self._wake - time.perf_counter(), 0))
            if self.loop is not None:
                asyncio.run_coroutine_threadsafe(_passes(3), self.loop).result()
            with self._lock:
                messages.append(self._step())
        return messages

    def _step(self) -> StepOutputs:
        """One token for each request."""
        self.num_steps += 1
        self.emitted.append(time.perf_counter())
        step = StepOutputs([])
        for name, (request, tokens, count) in list(self._live.items()):
            last = count + 1 >= min(len(tokens), request.max_tokens)
            if count and not last:
                step.ids.append(name)
                step.tokens.append(tokens[count])
            else:
                output = SequenceOutput(name, tokens[count : count + 1])
                if last and tokens[count] in request.stop_token_ids:
                    output.finish_reason, output.stop_token = "stop", tokens[count]
                elif last:
                    output.finish_reason = "length"
                step.outputs.append(output)
            if last:
                del self._live[name]
            else:
                self._live[name] = (request, tokens, count + 1)
        return step

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify()


async def _passes(count: int) -> None:
    """Lets the event loop run whatever is ready, so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


def stub_engine(
    tokenizer: Tokenizer,
    reply: Reply,
    *,
    max_model_len: int = 4096,
    max_num_seqs: int = 256,
    steps_per_second: float | None = None,
    generation_config: Mapping | None = None,
) -> FrontEngine:
    """An engine for `AsyncLLM(engine=…)` over this tokenizer."""
    ready = Ready(max_model_len, tokenizer.vocab_size, max_num_seqs, 1 << 30)
    limits = ModelLimits(ready.vocab_size, ready.max_model_len)
    builder = RequestBuilder(tokenizer, limits, {}, generation_config or {}, 0)
    client = StubClient(ready, reply, steps_per_second)
    return FrontEngine(EngineConfig(model="stub", warm_up=False), client, builder)

"""One API request's way through the engine: several prompts and samples as one stream of deltas."""

import dataclasses
import time
from collections.abc import Mapping

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.errors import NO_TOKEN, InvalidRequestError
from jaxllm.frontend.outputs import CompletionOutput
from jaxllm.frontend.request_stream import RequestStream, wait_any
from jaxllm.serving.context import Context
from jaxllm.serving.errors import ApiError, api_error
from jaxllm.serving.services import Services

FIRST_WAIT = 0.05  # seconds that the answer's status waits for the engine's refusal
GRAMMAR_WAIT = 30.0  # the same where there is a grammar: its compilation may take long, and then be refused


@dataclasses.dataclass
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def json(self) -> dict:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class ClientLeft(Exception):
    """Nobody reads the answer any more."""


class Generation:
    """The samples of some prompts. Choice `prompt * n + sample` is that sample of that prompt.

    A sample that ends with finish_reason "error" ends all of it: reading raises ApiError with the engine's words.

    Attributes:
      names: the client's names of parameters that the engine may refuse, where they differ.

    Use: `await start()`, then `await read()` until nothing comes, then `close()` in any case: what has not ended
    is aborted.
    """

    def __init__(
        self,
        services: Services,
        context: Context,
        prompts: list[list[int]],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
    ):
        self._services, self._context, self._params = services, context, params
        self._prompts, self._priority, self._salt = prompts, priority, cache_salt
        self._metrics = services.metrics
        self.num_choices = len(prompts) * params.n
        self.usage = Usage(sum(map(len, prompts)))
        self.names: Mapping[str, str] = {}
        self._last = [0.0] * self.num_choices  # when each choice last brought something
        self._first = [0.0] * self.num_choices
        self._counts = [0] * self.num_choices
        self._ended = [False] * self.num_choices
        self._error: str | None = None
        self._streams: list[RequestStream] = []
        self._unended: dict[int, RequestStream] = {}  # by their prompts' numbers
        self._begun = [False] * len(prompts)
        self._unmeasured: list[tuple[int, CompletionOutput]] = []  # read at `_read_at`
        self._read_at = 0.0
        self._ticket = services.admission.enter(self.num_choices, self.usage.prompt_tokens)

    @property
    def has_grammar(self) -> bool:
        """Whether its outputs must have a form, so that `start` waits until the engine knows what that takes."""
        return self._params.structured_outputs is not None

    async def start(self) -> None:
        """Submits everything; raises what the engine refuses at once. Any error ends all of it."""
        try:
            for position, prompt in enumerate(self._prompts):
                self._streams.append(
                    self._services.llm.submit(
                        {"prompt_token_ids": prompt},
                        self._params,
                        request_id=f"{self._context.number}.{position}",
                        priority=self._priority,
                        cache_salt=self._salt,
                    )
                )
            self._unended = dict(enumerate(self._streams))
            await wait_any(self._streams, GRAMMAR_WAIT if self.has_grammar else FIRST_WAIT)
            for stream in self._streams:
                if stream.error is not None:
                    raise self._by_its_name(stream.error)
        except BaseException as error:
            self._ended = [True] * self.num_choices  # refused: there was no sample that could end
            self._error = str(error) or type(error).__name__
            self.close()
            if isinstance(error, InvalidRequestError):
                raise self._by_its_name(error) from None
            raise

    def _by_its_name(self, error: Exception) -> Exception:
        """What the engine refuses, by the client's name."""
        return api_error(error, self.names) if isinstance(error, InvalidRequestError) else error

    def cut_off(self) -> None:
        """Nobody is there to read any more: `read` raises ClientLeft."""
        for stream in self._streams:
            stream.fail(ClientLeft())

    def close(self) -> None:
        """Ends what has not ended."""
        self._measure()
        for stream in self._streams:
            self._services.llm.close_stream(stream)
        if self._streams:
            self._streams = []
            for index, ended in enumerate(self._ended):
                if not ended:
                    self._error = self._error or "aborted: the client has left, or the deadline has passed"
                    self._end(index, "abort", time.perf_counter())
            self._context.log |= {
                "prompt_tokens": self.usage.prompt_tokens,
                "output_tokens": self.usage.completion_tokens,
                "cached_tokens": self.usage.cached_tokens,
            }
            self._trace()
        self._ticket.leave()

    def _trace(self) -> None:
        """One span for all of it."""
        if self._services.tracing is None:
            return
        params, log = self._params, self._context.log
        attributes = {
            "gen_ai.request.id": self._context.request_id,
            "gen_ai.request.n": params.n,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.usage.prompt_tokens": self.usage.prompt_tokens,
            "gen_ai.usage.completion_tokens": self.usage.completion_tokens,
            "gen_ai.usage.num_sequences": self.num_choices,
            "gen_ai.latency.time_in_queue": log.get("queue_s"),
            "gen_ai.latency.time_to_first_token": log.get("ttft_s"),
        }
        seconds = time.perf_counter() - self._context.begin
        self._services.tracing.request(seconds, self._context.caller, attributes, self._error)

    async def read(self) -> list[tuple[int, CompletionOutput]]:
        """What is new, by choice; waits for it. Empty at the end."""
        self._measure()
        found: list[tuple[int, CompletionOutput]] = []
        while self._unended and not found:
            await wait_any(self._unended.values())
            for position, stream in list(self._unended.items()):
                try:
                    deltas = stream.take()
                except InvalidRequestError as error:
                    raise self._by_its_name(error) from error
                if deltas:
                    if not self._begun[position]:
                        self._begin(position)
                    found += [(position * self._params.n + delta.index, delta) for delta in deltas]
                elif deltas is not None:
                    del self._unended[position]
        self._unmeasured, self._read_at = found, time.perf_counter()
        for _, delta in found:
            self.usage.completion_tokens += len(delta.token_ids)
            if delta.finish_reason == "error":
                self._error = delta.error
                if delta.error == NO_TOKEN and (field := self._forbids()) is not None:
                    message = f"{field}={getattr(self._params, field)}: forbids every token that the asked form needs"
                    raise ApiError(400, message, field, "no_token_left")
                raise ApiError(500, delta.error or "the engine has given up this sample", None, "generation_error")
        return found

    def _forbids(self) -> str | None:
        """A parameter that forbids tokens beside a form, which then may have none left: the request's own fault."""
        if not self.has_grammar:
            return None
        names = ("min_tokens", "allowed_token_ids", "bad_words")
        return next((name for name in names if getattr(self._params, name)), None)

    def _measure(self) -> None:
        """Counts what was read last: not before it has been sent on."""
        found, self._unmeasured = self._unmeasured, []
        metrics, context, now = self._metrics, self._context, self._read_at
        for index, delta in found:
            if count := len(delta.token_ids):
                self._counts[index] += count
                metrics.generated += count
                if self._first[index]:
                    metrics.itl.observe(now - self._last[index])
                else:
                    self._first[index] = now
                    metrics.ttft.observe(now - context.begin)
                    context.log.setdefault("ttft_s", round(now - context.begin, 6))
                self._last[index] = now
            if delta.finish_reason is not None:
                self._end(index, delta.finish_reason, now)

    def _begin(self, position: int) -> None:
        """A prompt's first output is there."""
        self._begun[position] = True
        output = self._streams[position].collector.output
        self.usage.cached_tokens += output.num_cached_tokens
        if output.queue_time is not None:
            self._metrics.queue_time.observe(output.queue_time)
            self._context.log.setdefault("queue_s", round(output.queue_time, 6))
        self._ticket.started()

    def _end(self, index: int, reason: str, now: float) -> None:
        metrics, count = self._metrics, self._counts[index]
        self._ended[index] = True
        metrics.finished(reason)
        metrics.e2e.observe(now - self._context.begin)
        metrics.output_length.observe(count)
        if count > 1:
            metrics.tpot.observe((self._last[index] - self._first[index]) / (count - 1))
        if index % self._params.n == 0:
            length = len(self._prompts[index // self._params.n])
            metrics.prompt_tokens.inc(length)
            metrics.prompt_length.observe(length)
        self._context.log.setdefault("finish_reasons", []).append(reason)

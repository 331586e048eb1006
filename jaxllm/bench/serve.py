"""`jaxllm bench serve`: requests that arrive by a Poisson process, through `AsyncLLM` in this process or a server.

Figures are those of `vllm bench serve`: TTFT from arrival to the first token, TPOT (last - first) / (tokens - 1), ITL
every gap between outputs of a request, E2EL from arrival to the last token; over all requests (ITL: over all gaps).
"""

import asyncio
import dataclasses
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxllm.async_llm import AsyncLLM
from jaxllm.bench.latency import percentile
from jaxllm.bench.models import bench_model
from jaxllm.bench.session import greedy
from jaxllm.bench.workloads import poisson_arrivals
from jaxllm.errors import InvalidRequestError

Arrival = tuple[float, list[int], int]
TIMES = ("ttft", "tpot", "itl", "e2el")
GOODPUT = ("ttft", "tpot", "e2el")  # what a single request has one of
COUNTERS = ("late_compilations", "preemptions")  # what else of an engine is told


class Target(Protocol):
    """Where requests go. Prompts are of token ids below `vocab_size`."""

    vocab_size: int

    def outputs(self, prompt: list[int], num_tokens: int, salt: str) -> AsyncIterator[int]:
        """Sends a request for exactly so many greedy tokens; how many each output brings. No prompt of another salt
        may help it."""
        ...

    async def stats(self) -> Mapping[str, float]:
        """Counters so far, those of `COUNTERS` among them."""
        ...


class InProcess:
    """An AsyncLLM as target."""

    def __init__(self, llm: AsyncLLM):
        self._llm, self.vocab_size = llm, llm.builder.limits.vocab_size

    async def outputs(self, prompt: list[int], num_tokens: int, salt: str) -> AsyncIterator[int]:
        async for delta in self._llm.generate(prompt, greedy(num_tokens), cache_salt=salt):
            yield len(delta.token_ids)

    async def stats(self) -> Mapping[str, float]:
        return await self._llm.stats()


@dataclasses.dataclass
class Spread:
    """Mean and percentiles in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """All 0 of nothing."""
        if not values:
            return cls(0.0, 0.0, 0.0, 0.0)
        return cls(statistics.fmean(values), *(percentile(values, share) for share in (50, 90, 99)))


@dataclasses.dataclass
class ServeResult:
    """One run at one rate. Times in seconds, rates in requests/s and tokens/s.

    Attributes:
      rate: at which requests arrive; `request_s` at which they were done.
      total_tok_s: input and output tokens.
      goodput_s: requests/s that kept every limit that was asked for; None if none was.
    """

    rate: float
    num_requests: int
    seconds: float
    request_s: float
    output_tok_s: float
    total_tok_s: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2el: Spread
    goodput_s: float | None
    late_compilations: float
    preemptions: float


@dataclasses.dataclass
class RateResult:
    """One rate: every run, and the medians of their figures, each figure by itself."""

    rate: float
    median: ServeResult
    runs: list[ServeResult]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeWork:
    """What arrives.

    Attributes:
      rates: requests/s, one after the other.
      num_requests: of each run, with lengths uniform on [mean/2, 3*mean/2].
      runs: at each rate.
      goodput: the most seconds of "ttft", "tpot" or "e2el" that a good request may take.

    Raises:
      InvalidRequestError: a rate that is not above 0, or an unknown limit.
    """

    rates: tuple[float, ...]
    num_requests: int = 256
    mean_in: int = 512
    mean_out: int = 128
    runs: int = 1
    goodput: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(not rate > 0 for rate in self.rates):
            raise InvalidRequestError("rate", list(self.rates), "must be above 0")
        for name, limit in self.goodput.items():
            if name not in GOODPUT or not limit > 0:
                raise InvalidRequestError("goodput", f"{name}:{limit}", f"must limit {', '.join(GOODPUT)}, above 0")


@dataclasses.dataclass
class _Times:
    """When one request arrived and when its outputs came, in seconds; and its tokens."""

    arrival: float
    outputs: list[float] = dataclasses.field(default_factory=list)
    num_tokens: int = 0

    def figures(self) -> dict[str, float]:
        """What goodput limits."""
        gaps = max(self.num_tokens - 1, 1)
        return {
            "ttft": self.outputs[0] - self.arrival,
            "tpot": (self.outputs[-1] - self.outputs[0]) / gaps,
            "e2el": self.outputs[-1] - self.arrival,
        }


async def _one(target: Target, arrival: Arrival, begin: float, salt: str) -> _Times:
    at, prompt, count = arrival
    await asyncio.sleep(max(begin + at - time.perf_counter(), 0))
    times = _Times(time.perf_counter())
    async for num_tokens in target.outputs(prompt, count, salt):
        if num_tokens:
            times.outputs.append(time.perf_counter())
            times.num_tokens += num_tokens
    if times.num_tokens != count:
        raise RuntimeError(f"{times.num_tokens} tokens instead of {count}")
    return times


async def _run(
    target: Target, arrivals: Sequence[Arrival], rate: float, salt: str, goodput: Mapping[str, float]
) -> ServeResult:
    before = await target.stats()
    begin = time.perf_counter()
    times = await asyncio.gather(*(_one(target, arrival, begin, salt) for arrival in arrivals))
    seconds = time.perf_counter() - begin
    after = await target.stats()
    figures = [t.figures() for t in times]
    good = sum(all(each[name] <= limit for name, limit in goodput.items()) for each in figures)
    tokens_in, tokens_out = sum(len(prompt) for _, prompt, _ in arrivals), sum(t.num_tokens for t in times)
    return ServeResult(
        rate=rate,
        num_requests=len(arrivals),
        seconds=seconds,
        request_s=len(arrivals) / seconds,
        output_tok_s=tokens_out / seconds,
        total_tok_s=(tokens_in + tokens_out) / seconds,
        ttft=Spread.of([each["ttft"] for each in figures]),
        tpot=Spread.of([each["tpot"] for each, t in zip(figures, times, strict=True) if t.num_tokens > 1]),
        itl=Spread.of([b - a for t in times for a, b in zip(t.outputs, t.outputs[1:], strict=False)]),
        e2el=Spread.of([each["e2el"] for each in figures]),
        goodput_s=good / seconds if goodput else None,
        late_compilations=after["late_compilations"] - before["late_compilations"],
        preemptions=after["preemptions"] - before["preemptions"],
    )


def median_of(results: Sequence[Any]) -> Any:
    """Figure by figure, of one kind of dataclass of numbers, None and such dataclasses."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(results[0]):
        each = [getattr(result, field.name) for result in results]
        if all(value == each[0] for value in each):
            values[field.name] = each[0]  # None, or an integer that a median of two would make a float
        elif dataclasses.is_dataclass(each[0]):
            values[field.name] = median_of(each)
        else:
            values[field.name] = statistics.median(each)
    return type(results[0])(**values)


async def serve_rates(
    target: Target, work: ServeWork, on_result: Callable[[list[RateResult]], None] = lambda _: None
) -> list[RateResult]:
    """Every rate's runs, after a few requests that are not counted.

    Each run has a cache salt of its own, so that no prompt is found in the prefix cache. `on_result` gets all that is
    there after every run. Raises any of jaxllm.errors.
    """
    vocab_size = target.vocab_size
    n, mean_in, mean_out = work.num_requests, work.mean_in, work.mean_out
    first = poisson_arrivals(vocab_size, 1000.0, min(n, 8), mean_in, min(mean_out, 16))
    await _run(target, first, 1000.0, "first", {})
    results: list[RateResult] = []
    for rate in work.rates:
        arrivals = poisson_arrivals(vocab_size, rate, n, mean_in, mean_out)
        runs: list[ServeResult] = []
        for run in range(max(work.runs, 1)):
            runs.append(await _run(target, arrivals, rate, f"{rate} {run}", work.goodput))
            if run == 0:
                results.append(RateResult(rate, runs[0], runs))
            results[-1].median = median_of(runs)
            on_result(results)
    return results


async def run_serve(model: str, options: dict[str, Any], work: ServeWork, *, warm_up: bool = True) -> list[RateResult]:
    """`serve_rates` on an engine of its own. Raises any of jaxllm.errors."""
    with bench_model(model, options) as (path, options):
        async with AsyncLLM(path, **options) as llm:
            if warm_up:
                await llm.warm_up()
            return await serve_rates(InProcess(llm), work)

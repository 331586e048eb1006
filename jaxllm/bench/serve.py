"""`jaxllm bench serve`: requests that arrive by a Poisson process, through `AsyncLLM` in this process.

Figures are those of `vllm bench serve`: TTFT from arrival to the first token, TPOT (last - first) / (tokens - 1), ITL
every gap between outputs of a request. Percentiles are over all requests (ITL: over all gaps).
"""

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

from jaxllm.async_llm import AsyncLLM
from jaxllm.bench.latency import percentile
from jaxllm.bench.models import bench_model
from jaxllm.bench.session import greedy
from jaxllm.bench.workloads import poisson_arrivals
from jaxllm.errors import InvalidRequestError

Arrival = tuple[float, list[int], int]


@dataclasses.dataclass
class ServeResult:
    """One run at one rate. Times in seconds, rate in requests/s."""

    rate: float
    num_requests: int
    seconds: float
    output_tok_s: float
    request_s: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    itl_p50: float
    itl_p99: float
    late_compilations: int
    preemptions: int


@dataclasses.dataclass
class _Times:
    """When one request arrived and when its outputs came, in seconds; and its tokens."""

    arrival: float
    outputs: list[float] = dataclasses.field(default_factory=list)
    num_tokens: int = 0


async def _one(llm: AsyncLLM, arrival: Arrival, begin: float, salt: str) -> _Times:
    at, prompt, count = arrival
    await asyncio.sleep(max(begin + at - time.perf_counter(), 0))
    times = _Times(time.perf_counter())
    async for delta in llm.generate(prompt, greedy(count), cache_salt=salt):
        if delta.token_ids:
            times.outputs.append(time.perf_counter())
            times.num_tokens += len(delta.token_ids)
    if times.num_tokens != count:
        raise RuntimeError(f"{times.num_tokens} tokens instead of {count}")
    return times


async def _run(llm: AsyncLLM, arrivals: Sequence[Arrival], rate: float, salt: str) -> ServeResult:
    before = await llm.stats()
    begin = time.perf_counter()
    times = await asyncio.gather(*(_one(llm, arrival, begin, salt) for arrival in arrivals))
    seconds = time.perf_counter() - begin
    after = await llm.stats()
    ttft = [t.outputs[0] - t.arrival for t in times]
    tpot = [(t.outputs[-1] - t.outputs[0]) / (t.num_tokens - 1) for t in times if t.num_tokens > 1]
    itl = [later - earlier for t in times for earlier, later in zip(t.outputs, t.outputs[1:], strict=False)]
    return ServeResult(
        rate=rate,
        num_requests=len(arrivals),
        seconds=seconds,
        output_tok_s=sum(t.num_tokens for t in times) / seconds,
        request_s=len(arrivals) / seconds,
        ttft_p50=percentile(ttft, 50),
        ttft_p99=percentile(ttft, 99),
        tpot_p50=percentile(tpot, 50),
        tpot_p99=percentile(tpot, 99),
        itl_p50=percentile(itl, 50),
        itl_p99=percentile(itl, 99),
        late_compilations=after["late_compilations"] - before["late_compilations"],
        preemptions=after["preemptions"] - before["preemptions"],
    )


def _median(results: Sequence[ServeResult]) -> ServeResult:
    """Figure by figure."""
    names = [field.name for field in dataclasses.fields(ServeResult)]
    return ServeResult(**{name: statistics.median(getattr(result, name) for result in results) for name in names})


async def run_serve(
    model: str,
    options: dict[str, Any],
    rates: Sequence[float],
    *,
    num_requests: int = 256,
    mean_in: int = 512,
    mean_out: int = 128,
    runs: int = 1,
    warm_up: bool = True,
) -> list[tuple[ServeResult, list[ServeResult]]]:
    """For each rate the medians of `runs` runs, and the runs.

    Each run has a cache salt of its own, so that no prompt is found in the prefix cache. Raises any of jaxllm.errors.
    """
    if any(not rate > 0 for rate in rates):
        raise InvalidRequestError("rate", list(rates), "must be above 0")
    results = []
    with bench_model(model, options) as (path, options):
        async with AsyncLLM(path, **options) as llm:
            vocab_size = llm.builder.limits.vocab_size
            if warm_up:
                await llm.warm_up()
            first = poisson_arrivals(vocab_size, 1000.0, min(num_requests, 8), mean_in, min(mean_out, 16))
            await _run(llm, first, 1000.0, "first")
            for rate in rates:
                arrivals = poisson_arrivals(vocab_size, rate, num_requests, mean_in, mean_out)
                each = [await _run(llm, arrivals, rate, f"{rate} {run}") for run in range(max(runs, 1))]
                results.append((_median(each), each))
    return results

"""`jaxllm bench latency`: one request at a time."""

import dataclasses
import time
from collections.abc import Sequence

from jaxllm.bench.floor import Work, phases
from jaxllm.bench.session import Session, greedy
from jaxllm.bench.workloads import uniform


@dataclasses.dataclass
class LatencyResult:
    """Seconds of single requests, one after the other.

    Attributes:
      ttft: submission to first token, p50 and p99 over the runs; `ttft_floor` its least time.
      tpot: (last token - first token) / (tokens - 1); `tpot_floor` its least time.
      decode_tok_s: 1 / the median tpot.
      bandwidth: bytes that a decode step needs over the median tpot.
      floor_share: tpot_floor over the median tpot.
    """

    input_tokens: int
    output_tokens: int
    runs: int
    ttft_p50: float
    ttft_p99: float
    ttft_floor: float | None
    tpot_p50: float
    tpot_p99: float
    tpot_floor: float | None
    decode_tok_s: float
    bandwidth: float
    floor_share: float | None
    late_compilations: int


def percentile(values: Sequence[float], share: float) -> float:
    """By linear interpolation; share in [0, 100]. NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    at = (len(ordered) - 1) * share / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def run_latency(session: Session, input_len: int = 128, output_len: int = 128, runs: int = 5) -> LatencyResult:
    """`runs` requests after one that is not counted. Raises InvalidRequestError if the engine has no room for them."""
    ((prompt, _),) = uniform(1, session.vocab_size, 1, input_len, output_len)
    ttfts, tpots = [], []
    before = session.llm.stats()
    for run in range(runs + 1):
        session.llm.reset_prefix_cache()
        begin = time.perf_counter()
        first = last = 0.0
        count = 0
        for delta in session.llm.stream(prompt, greedy(output_len)):
            last = time.perf_counter()
            first = first or last
            count += len(delta.token_ids)
        if count != output_len:
            raise RuntimeError(f"{count} tokens instead of {output_len}")
        if run:
            ttfts.append(first - begin)
            tpots.append((last - first) / max(output_len - 1, 1))
    late = session.llm.stats()["late_compilations"] - before["late_compilations"]
    prefill, *decode = phases(session.cost, [(prompt, output_len)])
    work = sum(decode, Work())
    ceilings, steps = session.ceilings, max(len(decode), 1)
    tpot = percentile(tpots, 50)
    tpot_floor = None if ceilings is None else sum(map(ceilings.seconds, decode)) / steps
    return LatencyResult(
        input_tokens=input_len,
        output_tokens=output_len,
        runs=runs,
        ttft_p50=percentile(ttfts, 50),
        ttft_p99=percentile(ttfts, 99),
        ttft_floor=None if ceilings is None else ceilings.seconds(prefill),
        tpot_p50=tpot,
        tpot_p99=percentile(tpots, 99),
        tpot_floor=tpot_floor,
        decode_tok_s=1 / tpot if tpot else 0.0,
        bandwidth=work.bytes / steps / tpot if tpot else 0.0,
        floor_share=tpot_floor / tpot if tpot_floor and tpot else None,
        late_compilations=late,
    )

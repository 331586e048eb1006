"""`jaxllm bench throughput`: workloads, all requests at once."""

import dataclasses
import time
from collections.abc import Sequence

from jaxllm.bench.floor import floor_of
from jaxllm.bench.session import Session, greedy
from jaxllm.bench.workloads import CPU_WORKLOADS, OTHER_WORKLOADS, STATIC_WORKLOADS, WORKLOADS, Workload
from jaxllm.errors import InvalidRequestError


@dataclasses.dataclass
class ThroughputResult:
    """A workload's figures, of the best run. None: was not recorded.

    Attributes:
      seconds: from submission to the last token; `all_seconds` of every run.
      output_tok_s, total_tok_s: output tokens, and input and output tokens, a second.
      bandwidth, flops: bytes and FLOPs that the work needs (see `jaxllm.bench.floor`) over the seconds it took.
      floor_seconds, floor_share: the least time on this device, and which share of the floor's speed was reached.
      steps, padded_share: engine steps, and the share of their tokens that was padding.
      late_compilations, preemptions: what a good run has none of.
      prefix_hit_share: share of the input tokens found in the prefix cache.
    """

    workload: str
    num_requests: int
    input_tokens: int
    output_tokens: int
    seconds: float
    all_seconds: list[float]
    output_tok_s: float
    total_tok_s: float
    bandwidth: float
    flops: float
    floor_seconds: float | None
    floor_share: float | None
    steps: int | None
    padded_share: float | None
    late_compilations: int | None
    preemptions: int | None
    prefix_hit_share: float | None


@dataclasses.dataclass
class Figures:
    """By how much the engine's counters grew over a run, as in `ThroughputResult`; `host_seconds`: what the engine's
    loop worked itself, of which `launch_seconds` in JAX's calls that launch steps."""

    steps: int
    padded_share: float
    late_compilations: int
    preemptions: int
    prefix_hit_tokens: int
    host_seconds: float
    launch_seconds: float


def workload(name: str, vocab_size: int, num_requests: int | None = None) -> Workload:
    """A workload by name, cut or grown to `num_requests` where it can be. Raises InvalidRequestError."""
    known = {**WORKLOADS, **OTHER_WORKLOADS}
    if name not in known:
        raise InvalidRequestError("workload", name, f"must be one of {', '.join(known)}")
    if num_requests is None:
        return known[name](vocab_size)
    if num_requests < 1:
        raise InvalidRequestError("num_requests", num_requests, "must be at least 1")
    try:
        return known[name](vocab_size, num_requests)
    except TypeError:
        raise InvalidRequestError("num_requests", num_requests, f"{name} has one request") from None


def choose_workloads(
    given: Sequence[str], vocab_size: int, max_model_len: int, *, on_cpu: bool, num_requests: int | None = None
) -> tuple[list[str], dict[str, str]]:
    """Which workloads to run: those given or, without any, this kind of device's that the engine has room for.

    Returns:
      their names, and why each of the others was left out.

    Raises:
      InvalidRequestError: one that was given does not fit.
    """
    chosen: list[str] = []
    left_out: dict[str, str] = {}
    for name in given or (CPU_WORKLOADS if on_cpu else {**WORKLOADS, **STATIC_WORKLOADS}):
        try:
            requests = workload(name, vocab_size, num_requests)
            longest = max(len(prompt) + count for prompt, count in requests)
            if longest > max_model_len:
                reason = f"has a request of {longest} tokens (max_model_len={max_model_len})"
                raise InvalidRequestError("workload", name, reason)
        except InvalidRequestError as error:
            if given:
                raise
            left_out[name] = str(error)
        else:
            chosen.append(name)
    return chosen, left_out


def run_throughput(session: Session, name: str, runs: int = 2, num_requests: int | None = None) -> ThroughputResult:
    """Runs a workload `runs` times, each with an empty prefix cache, and reports the fastest.

    Raises InvalidRequestError for an unknown name or a prompt that the engine has no room for.
    """
    requests = workload(name, session.vocab_size, num_requests)
    measured = [run_once(session, requests) for _ in range(max(runs, 1))]
    seconds, figures = min(measured, key=lambda run: run[0])
    tokens_in = sum(len(prompt) for prompt, _ in requests)
    tokens_out = sum(count for _, count in requests)
    floor = floor_of(session.cost, requests, session.ceilings)
    return ThroughputResult(
        workload=name,
        num_requests=len(requests),
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        seconds=seconds,
        all_seconds=[each for each, _ in measured],
        output_tok_s=tokens_out / seconds,
        total_tok_s=(tokens_in + tokens_out) / seconds,
        bandwidth=floor.work.bytes / seconds,
        flops=floor.work.flops / seconds,
        floor_seconds=floor.seconds,
        floor_share=None if floor.seconds is None else floor.seconds / seconds,
        steps=figures.steps,
        padded_share=figures.padded_share,
        late_compilations=figures.late_compilations,
        preemptions=figures.preemptions,
        prefix_hit_share=figures.prefix_hit_tokens / tokens_in,
    )


def run_once(session: Session, requests: Workload) -> tuple[float, Figures]:
    """Seconds of one run, which begins with an empty prefix cache, and the engine's figures of it."""
    llm = session.llm
    llm.reset_prefix_cache()
    prompts = [prompt for prompt, _ in requests]
    params = [greedy(count) for _, count in requests]
    before = llm.stats()
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - begin
    after = llm.stats()
    for output, (_, count) in zip(outputs, requests, strict=True):
        made = output.outputs[0]
        if len(made.token_ids) != count:
            raise RuntimeError(f"{len(made.token_ids)} tokens instead of {count} (finish_reason={made.finish_reason})")
    grown = {name: value - before[name] for name, value in after.items() if isinstance(value, int | float)}
    computed = grown["padded_tokens"]  # the steps' sizes, padding included
    return seconds, Figures(
        steps=grown["steps"],
        padded_share=1 - grown["scheduled_tokens"] / computed if computed else 0.0,
        late_compilations=grown["late_compilations"],
        preemptions=grown["preemptions"],
        prefix_hit_tokens=grown["prefix_hit_tokens"],
        host_seconds=grown["host_seconds"],
        launch_seconds=grown["launch_seconds"],
    )

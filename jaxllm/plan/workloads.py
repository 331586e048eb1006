"""Workloads of `jaxllm bench` on a mesh that is not there: the engine's scheduler and the times of its steps."""

from collections.abc import Sequence

from jaxllm.bench.floor import floor_of, num_computed
from jaxllm.plan.fit import Fit
from jaxllm.plan.plan import Times, WorkloadTimes
from jaxllm.plan.simulate import steps
from jaxllm.plan.times import Clock


def predict_workload(name: str, requests: Sequence[tuple[list[int], int]], fitted: Fit, clock: Clock) -> WorkloadTimes:
    """Times of (prompt token ids, tokens to generate), dealt out to the ranks in turn.

    The prediction follows the scheduler's steps, after the host has taken all prompts in. The floor is that of `jaxllm
    bench`, which knows no steps, at the chip's published rates, with the sums of its tokens over tensor shards.

    Raises InvalidRequestError for a request that the cache or max_model_len has no room for.
    """
    admission = clock.predict_admission(sum(len(prompt) for prompt, _ in requests))
    taken: list[tuple[int, float, float | None]] = []
    for rank in range(fitted.data):
        own = requests[rank :: fitted.data]
        if own:
            made = list(steps(own, fitted.scheduler, fitted.groups, fitted.decode_rungs))
            predicted = [clock.predict(step) for step in made]
            known = None
            if admission is not None:
                known = admission + sum(each for each in predicted if each is not None)
            floor = floor_of(clock.cost, own, clock.chip.ceilings).seconds or 0.0
            floor += clock.sums(num_computed(own))
            taken.append((len(made), floor, known))
    slowest = max(taken, key=lambda each: each[1] if each[2] is None else each[2])
    output_tokens = sum(count for _, count in requests)
    return WorkloadTimes(name, output_tokens, slowest[0], Times(slowest[1], slowest[2]))

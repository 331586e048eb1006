"""Short runs of an engine, for calibrations: from the first launch to the last token, and what comes before."""

import dataclasses
import time
from typing import Any

from jaxllm.bench.session import Session
from jaxllm.bench.throughput import run_once
from jaxllm.bench.workloads import Workload


@dataclasses.dataclass
class ShortRun:
    """Attributes:
    seconds: from the first launch to the last token.
    admission_seconds: from the call to the first launch: what the host takes the prompts in.
    host_seconds: what the engine's loop worked itself, JAX's launches included, waiting for the device left out.
    """

    seconds: float
    admission_seconds: float
    host_seconds: float


def short_run(session: Session, requests: Workload, rounds: int) -> ShortRun:
    """The fastest of so many runs, each with an empty prefix cache."""
    runner, begun = session.core.runner, []
    launch = runner.launch

    def noting(*args: Any, **kwargs: Any) -> Any:
        begun.append(time.perf_counter())
        return launch(*args, **kwargs)

    made = []
    runner.launch = noting
    try:
        for _ in range(rounds):
            begun.clear()
            before = time.perf_counter()
            whole, figures = run_once(session, requests)
            admission = begun[0] - before
            made.append(ShortRun(whole - admission, admission, figures.host_seconds))
    finally:
        runner.launch = launch
    return min(made, key=lambda run: run.seconds)

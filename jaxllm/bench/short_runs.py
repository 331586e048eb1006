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
    host_seconds: what the engine's loop worked itself from the first launch on, JAX's launches included, waiting for
      the device left out.
    """

    seconds: float
    admission_seconds: float
    host_seconds: float


def short_run(session: Session, requests: Workload, rounds: int) -> ShortRun:
    """The fastest of so many runs, each with an empty prefix cache."""
    core, runner = session.core, session.core.runner
    step, launch = core.step, runner.launch
    stepped = [0.0]  # when the last step began that has launched nothing yet
    launched: list[float] = []

    def noting_step() -> Any:
        if not launched:
            stepped[0] = time.perf_counter()
        return step()

    def noting_launch(*args: Any, **kwargs: Any) -> Any:
        launched.append(time.perf_counter())
        return launch(*args, **kwargs)

    made = []
    core.step, runner.launch = noting_step, noting_launch
    try:
        for _ in range(rounds):
            launched.clear()
            before = time.perf_counter()
            whole, figures = run_once(session, requests)
            admission, scheduling = launched[0] - before, launched[0] - stepped[0]
            made.append(ShortRun(whole - admission, admission, figures.host_seconds - scheduling))
    finally:
        core.step, runner.launch = step, launch
    return min(made, key=lambda run: run.seconds)

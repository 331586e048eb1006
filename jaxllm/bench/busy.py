"""`jaxllm bench all`, part busy: which share of a workload's time the device works, by the profiler's own record."""

import collections
import dataclasses
import re

import jax

from jaxllm.bench.session import Session
from jaxllm.bench.throughput import run_once, workload
from jaxllm.bench.trace import recording, union

TOP = 15  # kernels that are told one by one
MIN_RECORDED = 0.8  # of the run, from the first kernel to the last: a full buffer drops what comes later


@dataclasses.dataclass
class Kernel:
    """Everything of one name, without the number that XLA puts behind it: seconds and calls of the whole run."""

    name: str
    seconds: float
    calls: int


@dataclasses.dataclass
class BusyResult:
    """One run of a workload under the profiler, after one without.

    Attributes:
      seconds, traced_seconds: from submission to the last token, without and with the profiler.
      busy_seconds: time in which at least one kernel or copy ran on the device, in the traced run.
      kernel_seconds: the sum of all kernels' and copies' times; above `busy_seconds` where some run side by side.
      busy_share: busy_seconds / traced_seconds.
      busy_share_untraced: busy_seconds / seconds: the profiler slows the host, hardly the kernels. None on a CPU, where
        it slows both.
      padded_share: share of the steps' tokens that was padding.
      host_seconds: of the engine's loop a step in the run without the profiler, JAX's calls that launch it included,
        waiting for the device left out; None in results of before it was counted.
      launch_seconds: of these, what JAX's calls took.
      kernels: those that took longest.
    """

    workload: str
    steps: int
    seconds: float
    traced_seconds: float
    busy_seconds: float
    kernel_seconds: float
    busy_share: float
    busy_share_untraced: float | None
    padded_share: float
    kernels: list[Kernel]
    host_seconds: float | None = None
    launch_seconds: float | None = None


def measure_busy(session: Session, name: str) -> BusyResult:
    """Runs a workload twice, the second time under `jax.profiler`. Raises RuntimeError if that recorded less
    than the run."""
    requests = workload(name, session.vocab_size)
    seconds, quiet = run_once(session, requests)
    with recording() as events:
        traced, figures = run_once(session, requests)
    if not events:
        raise RuntimeError("the profiler has recorded no kernel of this device")
    recorded = (max(end for *_, end in events) - min(start for _, start, _ in events)) * 1e-9
    if recorded < MIN_RECORDED * traced:
        raise RuntimeError(f"the profiler has recorded {recorded:.2f} s of {traced:.2f} s: its buffers are too small")
    busy = union([(start, end) for _, start, end in events]) * 1e-9
    calls: collections.defaultdict[str, list[float]] = collections.defaultdict(list)  # seconds of each, by name
    for kernel, start, end in events:
        calls[re.sub(r"([._]\d+)+$", "", kernel)].append((end - start) * 1e-9)
    kernels = [Kernel(kernel[:100], sum(times), len(times)) for kernel, times in calls.items()]
    kernels.sort(key=lambda kernel: -kernel.seconds)
    return BusyResult(
        workload=name,
        steps=figures.steps,
        seconds=seconds,
        traced_seconds=traced,
        busy_seconds=busy,
        kernel_seconds=sum(kernel.seconds for kernel in kernels),
        busy_share=busy / traced,
        busy_share_untraced=None if jax.default_backend() == "cpu" else busy / seconds,
        padded_share=figures.padded_share,
        kernels=kernels[:TOP],
        host_seconds=quiet.host_seconds / quiet.steps,
        launch_seconds=quiet.launch_seconds / quiet.steps,
    )

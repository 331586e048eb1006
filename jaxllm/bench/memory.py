"""`jaxllm bench all`, part memory: what the engine planned beside what XLA and the device say."""

import dataclasses
import resource

import jax

from jaxllm.bench.session import Session
from jaxllm.engine.executables import Forward
from jaxllm.engine.runner import Runner
from pallas_kernels.ragged_paged_attention import cache_shape


@dataclasses.dataclass
class MemoryResult:
    """Bytes of one device, and of this process.

    Attributes:
      after: what had been done when it was read.
      limit, budget: what JAX may use of the device, and the share of it that the engine plans with; None on a CPU.
      weights: planned.
      cache: all pages of all layers, as they are laid out.
      step: XLA's temporaries of the largest step (`memory_analysis` of its executable); None if it is not compiled.
      live: arrays that exist.
      in_use, peak: what the device's allocator says; None on a CPU. The peak is the process's.
      host_peak: largest resident size of this process.
    """

    after: str
    limit: int | None
    budget: int | None
    weights: int
    cache: int
    step: int | None
    live: int
    in_use: int | None
    peak: int | None
    host_peak: int


def measure_memory(session: Session, after: str) -> MemoryResult:
    """Reads what stands now; nothing is run."""
    runner: Runner = session.core.runner
    plan = runner.plan
    shapes = [cache_shape(plan.cache_spec(layer), plan.backend) for layer in plan.layers]
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    largest = Forward(plan.scheduler.token_rungs[-1])
    ready = runner.executables.ready(largest)
    analysis = runner.executables.get(largest).memory_analysis() if ready else None
    return MemoryResult(
        after=after,
        limit=limit,
        budget=None if limit is None else int(limit * session.llm.config.memory_utilization),
        weights=plan.weight_bytes,
        cache=sum(shape.size * shape.dtype.itemsize for shape in shapes),
        step=None if analysis is None else analysis.temp_size_in_bytes,
        live=sum(array.nbytes for array in jax.live_arrays()) // session.facts.num_devices,
        in_use=stats.get("bytes_in_use"),
        peak=stats.get("peak_bytes_in_use"),
        host_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
    )

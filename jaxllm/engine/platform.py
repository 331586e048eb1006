"""XLA's settings, chosen by measurement, in one place. To be applied before JAX touches a device."""

import contextlib
import ctypes
import os
import sys

# JAX takes three quarters of an accelerator's memory by default. The engine plans `memory_utilization` of what JAX may
# use, and cuBLAS, NCCL and executables need some outside.
MEMORY_FRACTION = 0.95
# Several GPUs: outside are also NCCL's buffers and the scratch of XLA's all-reduces, up to 8 MiB each in every
# executable. A 70B model on four H200 ran out of it with 0.95 and not with 0.8.
GROUP_MEMORY_FRACTION = 0.8
# What programs are compiled with for TPUs; the names are libtpu's. What they do to bytes is in docs/tpu.md.
_TPU_OPTIONS: dict[str, int | float] = {
    # XLA ends a program with fetching its largest weight into VMEM for the next run, and holds it there meanwhile. A
    # step's programs take turns, so that it is gone by then; the room that it took is missed by activations.
    "xla_msa_max_cross_program_prefetches": 0,
    # XLA gives up an array in VMEM that is not needed for more than so many times as long as it takes to copy it. Small
    # arrays, such as the residual stream of a small model, went to HBM and back in each layer.
    "xla_msa_max_overlap_to_mem_size_async_copy_ratio": 1000.0,
}
# VMEM that a product may take for its tiles, and the most columns of a residual stream with which it does, where XLA's
# limit (16 MiB on v5e, 32 on tpu7x) is more than they use. Without what is over, the residual stream, summand and sum
# between the shards of a 70B model stay there side by side, and on tpu7x, which has half of the others' VMEM, queries,
# keys and values of a small model. XLA's products of Llama 3.1 8B would take twice the cycles on tpu7x.
_TPU_TILES_KIB = {"TPU v5 lite": (12 * 1024, None), "TPU7x": (16 * 1024, 1024)}
THREADS = 16  # of XLA's pool for CPU devices, at least, where several processes share steps


def memory_fraction(num_devices: int) -> float:
    """The share of each GPU's memory that JAX takes, where so many run one engine."""
    return MEMORY_FRACTION if num_devices == 1 else GROUP_MEMORY_FRACTION


def tpu_compiler_options(device_kind: str, hidden_size: int) -> dict[str, int | float]:
    """Compiler options of a step's programs on TPUs of this `jax.Device.device_kind`, for a model of this size."""
    tiles, most = _TPU_TILES_KIB.get(device_kind, (None, None))
    if tiles is None or (most is not None and hidden_size > most):
        return _TPU_OPTIONS
    return {**_TPU_OPTIONS, "xla_tpu_scoped_vmem_limit_kib": tiles}


def configure(num_devices: int = 1) -> None:
    """Sets what the user's environment has not set, for an engine of so many devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(memory_fraction(num_devices)))


def configure_group() -> None:
    """The same for one of several processes; before JAX touches a device."""
    import jax

    # A collective on CPU devices holds a thread of XLA's pool until all shards have come; with as many threads as a
    # small machine has cores, those that wait keep those that would come from running.
    os.environ.setdefault("NPROC", str(max(THREADS, os.cpu_count() or 1)))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Processes that tune kernels in turns would wait for one that finds its executables on disk.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_shard_autotuning" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_shard_autotuning=false".strip()
    # JAX ends a process by abort when another is lost, and takes SIGTERM for itself.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)


def trim_memory() -> None:
    """Gives freed memory back to the system: compiling leaves some 100 MB an executable in glibc's arenas."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another libc has no such function
            ctypes.CDLL(None).malloc_trim(0)

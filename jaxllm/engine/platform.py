"""XLA's settings, chosen by measurement, in one place. To be applied before JAX touches a device."""

import contextlib
import ctypes
import logging
import os
import sys

logger = logging.getLogger(__name__)

# jaxlib's name for the share of each GPU's memory that it takes, and the one before it. It refuses both at once.
FRACTION, OLD_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
DEFAULT_FRACTION = 0.75  # jaxlib's, where neither is set
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


_set: float | None = None  # by `configure`: what stands in the environment and is not the user's


def configure(num_devices: int = 1) -> None:
    """Sets what the user's environment has not set, for an engine of so many devices.

    What an earlier engine had set gives way. Where JAX has taken its share of the GPUs already and it is another one,
    the log says so.
    """
    global _set
    if os.environ.get(OLD_FRACTION) or os.environ.get(FRACTION, "") not in ("", str(_set)):
        return
    wanted = memory_fraction(num_devices)
    if not _devices_are_in_use():
        os.environ[FRACTION], _set = str(wanted), wanted
    elif (taken := _set or DEFAULT_FRACTION) != wanted and _runs_on_gpus():
        logger.warning(
            "JAX had taken %s of each GPU's memory before an engine could ask for %s: start the engine before anything "
            "else touches a device, or set %s=%s",
            taken,
            wanted,
            FRACTION,
            wanted,
        )


def _devices_are_in_use() -> bool:
    """Whether JAX has started its backends; later it reads no environment."""
    if "jax" not in sys.modules:
        return False
    from jax._src import xla_bridge  # jax.extend has no such question

    return xla_bridge.backends_are_initialized()


def _runs_on_gpus() -> bool:
    import jax

    return jax.default_backend() == "gpu"


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

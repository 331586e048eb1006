"""What an engine must know of GPUs' memory at its start: whether JAX has got its share, and whether they reach each
other's."""

import ctypes
import itertools
import os
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jaxllm.engine.platform import DEFAULT_FRACTION, FRACTION, OLD_FRACTION
from jaxllm.errors import OutOfMemoryError

_PREALLOCATE, _ALLOCATOR = "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"


def check_got_memory(devices: Iterable[jax.Device], needed: int | None = None) -> None:
    """Raises OutOfMemoryError if JAX has not got what it would have of one of these GPUs, where another process, or
    what CUDA itself takes, leaves less.

    XLA's allocator takes its share at the first allocation. Where it cannot, it takes what it gets, in pieces, and says
    so in its log alone; the plan of the cache, made of the share, would run out of memory later. Nothing is known, and
    nothing said, where the user has set an allocator or has it take memory as it goes.

    Args:
      needed: bytes that suffice; None: the share.
    """
    grows = os.environ.get(_PREALLOCATE, "") in ("false", "False", "0")  # as jaxlib reads it
    if grows or os.environ.get(_ALLOCATOR, "default").lower() not in ("default", "bfc"):
        return
    for device in devices:
        if device.platform != "gpu" or "pool_bytes" not in (device.memory_stats() or {}):
            continue
        try:
            jax.block_until_ready(jax.device_put(np.zeros(1, np.int32), device))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        stats = device.memory_stats()
        asked, got = stats["bytes_limit"], stats["pool_bytes"]
        if got < (0.99 * asked if needed is None else min(needed, asked)):
            wanted = "" if needed is None else f", of which the engine needs {needed / 1e9:.1f} GB,"
            raise OutOfMemoryError(
                f"JAX asked for {asked / 1e9:.1f} GB of {device.device_kind} {device.local_hardware_id}{wanted} and "
                f"got {got / 1e9:.1f} GB: something else holds the rest (nvidia-smi shows which processes)"
                + _advice(got / asked)
            )


def _advice(part: float) -> str:
    """How to ask for this part of what was asked for; nothing where that is next to none."""
    name = OLD_FRACTION if os.environ.get(OLD_FRACTION) else FRACTION  # jaxlib refuses both at once
    share = int(100 * part * float(os.environ.get(name) or DEFAULT_FRACTION)) / 100
    return f". End that, or leave it what it has by setting {name}={share:.2f}" if share >= 0.05 else ""


def out_of_reach(devices: Sequence[jax.Device]) -> tuple[int, int] | None:
    """The first two GPUs of this process, by CUDA's numbers, of which one cannot read and write the other's memory, as
    CUDA's driver has it (cuDeviceCanAccessPeer). None: there are none such, or there is no driver to ask."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    for one, other in itertools.permutations([device.local_hardware_id for device in devices], 2):
        here, there, reaches = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        failed = (
            driver.cuDeviceGet(ctypes.byref(here), one)
            or driver.cuDeviceGet(ctypes.byref(there), other)
            or driver.cuDeviceCanAccessPeer(ctypes.byref(reaches), here, there)
        )
        if not failed and not reaches.value:
            return one, other
    return None

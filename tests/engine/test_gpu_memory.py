"""GPUs of which another process holds memory, pretended."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxllm.engine.gpu_memory import check_got_memory
from jaxllm.errors import OutOfMemoryError

LIMIT = 135_100_628_992


@pytest.fixture
def gpu(monkeypatch):
    """Makes GPUs whose allocator takes what is free at the first allocation, as XLA's on an H200 does."""
    for name in ("CLIENT_MEM_FRACTION", "PYTHON_CLIENT_MEM_FRACTION", "PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.delenv(f"XLA_{name}", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_ALLOCATOR", raising=False)

    def make(free: int, number: int = 0):
        stats = {"bytes_limit": LIMIT, "pool_bytes": 0}
        device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", local_hardware_id=number)
        device.memory_stats = lambda: dict(stats)
        device.touch = lambda: stats.update(pool_bytes=min(free, LIMIT))
        return device

    def put(array, device):
        device.touch()
        return np.asarray(array)

    monkeypatch.setattr(jax, "device_put", put)
    return make


def test_all_of_it(gpu):
    check_got_memory([gpu(LIMIT), gpu(LIMIT, 1)])


def test_a_part_is_refused_with_the_device_and_what_to_set(gpu, monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    with pytest.raises(OutOfMemoryError) as caught:
        check_got_memory([gpu(LIMIT), gpu(71_798_095_872, 1)])
    for part in ("135.1 GB", "NVIDIA H200 1", "71.8 GB", "nvidia-smi", "XLA_CLIENT_MEM_FRACTION=0.47"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "setting", [("XLA_PYTHON_CLIENT_PREALLOCATE", "false"), ("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")]
)
def test_what_grows_is_not_judged(gpu, monkeypatch, setting):
    monkeypatch.setenv(*setting)
    check_got_memory([gpu(1_000_000)])


def test_other_devices_have_no_such_pool(gpu):
    silent = gpu(0)
    silent.memory_stats = lambda: None
    tpu = gpu(0)
    tpu.platform = "tpu"
    check_got_memory([silent, tpu, jax.local_devices()[0]])

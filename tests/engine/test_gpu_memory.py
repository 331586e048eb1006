"""GPUs of which another process holds memory, and such that do not reach each other's, pretended."""

import ctypes
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxllm.config import EngineConfig
from jaxllm.engine import build
from jaxllm.engine.gpu_memory import check_got_memory, out_of_reach
from jaxllm.errors import OutOfMemoryError
from sharding import DATA, EXPERT, TENSOR

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
        if not device.memory_stats()["pool_bytes"]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4 bytes.")
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


def test_the_name_that_the_user_has_set_is_the_one_to_change(gpu, monkeypatch):
    """Both at once jaxlib refuses."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    with pytest.raises(OutOfMemoryError, match=r"setting XLA_PYTHON_CLIENT_MEM_FRACTION=0\.47$"):
        check_got_memory([gpu(71_798_095_872)])


@pytest.mark.parametrize("free", [0, 500_000_000])
def test_where_next_to_nothing_is_left_no_share_is_advised(gpu, monkeypatch, free):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    with pytest.raises(OutOfMemoryError, match=r"nvidia-smi shows which processes\)$"):
        check_got_memory([gpu(free)])


def test_a_cache_of_a_given_size_needs_no_more_than_itself(gpu):
    check_got_memory([gpu(71_798_095_872)], needed=70_000_000_000)
    with pytest.raises(OutOfMemoryError, match=r"the engine needs 72\.0 GB, and got 71\.8 GB"):
        check_got_memory([gpu(71_798_095_872)], needed=72_000_000_000)


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


class Driver:
    """CUDA's, of a machine with GPUs 0 to 3, of which some do not reach others."""

    def __init__(self, apart: set[tuple[int, int]]):
        self._apart = apart

    def cuDeviceGet(self, device, ordinal: int) -> int:
        device._obj.value = 10 + ordinal  # a handle is no ordinal
        return 0 if ordinal < 4 else 101

    def cuDeviceCanAccessPeer(self, reaches, device, peer) -> int:
        reaches._obj.value = (device.value - 10, peer.value - 10) not in self._apart
        return 0


@pytest.fixture
def tensor_axis(monkeypatch):
    """The axis over which a process with such GPUs sums by kernels."""

    def make(driver: Driver | None, ordinals: list[int]) -> str | None:
        def load(name):
            assert name == "libcuda.so.1"
            if driver is None:
                raise OSError(name)
            return driver

        monkeypatch.setattr(ctypes, "CDLL", load)
        devices = np.array([SimpleNamespace(process_index=0, local_hardware_id=ordinal) for ordinal in ordinals])
        sizes = {DATA: 1, EXPERT: 1, TENSOR: len(ordinals)}
        mesh = SimpleNamespace(shape=sizes, size=len(ordinals), devices=devices)
        return build.stream_axis(mesh, "gpu", EngineConfig())

    return make


@pytest.mark.parametrize(
    ("driver", "ordinals"),
    [
        (Driver(set()), [0, 1, 2, 3]),
        (Driver({(0, 1), (1, 3)}), [3, 2, 0]),
        (Driver({(0, 5)}), [0, 5]),  # of the fifth the driver knows nothing
        (None, [0, 1]),
    ],
)
def test_where_nothing_is_out_of_reach_kernels_sum(tensor_axis, driver, ordinals):
    assert tensor_axis(driver, ordinals) == TENSOR


@pytest.mark.parametrize("apart", [(1, 3), (3, 1)])
def test_gpus_out_of_reach_leave_sums_to_nccl_and_the_log_says_so(tensor_axis, caplog, apart):
    assert tensor_axis(Driver({apart}), [0, 1, 2, 3]) is None
    assert f"GPUs {apart[0]} and {apart[1]} cannot reach each other's memory: NCCL sums" in caplog.text


def test_one_gpu_reaches_itself():
    assert out_of_reach([SimpleNamespace(local_hardware_id=0)]) is None

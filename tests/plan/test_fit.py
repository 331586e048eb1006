"""What fits: the engine's own arithmetic, at the edges and in general."""

import contextlib
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config import EngineConfig
from jaxllm.core.kv_cache import KVCache
from jaxllm.engine.resolve import plan_engine
from jaxllm.errors import ConfigError, InvalidRequestError, OutOfMemoryError
from jaxllm.models.registry import model_class
from jaxllm.plan.chips import Chip, chip, chips
from jaxllm.plan.fit import Fit, fit, tensor_sizes
from jaxllm.plan.plan import chips_needed, make_plan, meshes
from tests.plan.shapes import PAGE_BYTES, SMALL, WINDOWED, model


def config(**options) -> EngineConfig:
    return EngineConfig(model="any", **options)


def with_memory(name: str, memory: int) -> Chip:
    """A chip with so many bytes that JAX may use."""
    return dataclasses.replace(chip(name), platform="none", memory=memory)


def fit_one(name: str, where: str | Chip, **options) -> Fit:
    return fit(model(name), chip(where) if isinstance(where, str) else where, config(**options), data=1, tensor=1)


@pytest.mark.parametrize("name", ["h100", "v6e", "l4"])
@pytest.mark.parametrize("hf", [SMALL, WINDOWED], ids=["full", "windows"])
@pytest.mark.parametrize("options", [{}, {"max_model_len": 1000, "max_num_seqs": 7, "page_size": 32}])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_engine_plans_the_same(monkeypatch, name, hf, options, tensor):
    there = chip(name)
    device = SimpleNamespace(
        platform=there.platform,
        device_kind=there.kind,
        compute_capability="9.0" if there.attention_backend == "gpu" else "8.0",
        memory_stats=lambda: {"bytes_limit": there.device_limit(tensor)},
    )
    monkeypatch.setattr(jax, "default_backend", lambda: there.platform)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    family = model_class(hf)
    shards = family(family.parse_config(hf).for_shards(tensor), dtype=jnp.bfloat16)
    engine = plan_engine(config(tensor_parallel_size=tensor, **options), shards)
    small = model("small" if hf is SMALL else "windowed")
    here = fit(small, there, config(**options), data=1, tensor=tensor)
    assert engine.backend == there.attention_backend
    assert here.groups == engine.groups
    assert here.scheduler == engine.scheduler
    assert here.decode_rungs == engine.decode_rungs
    assert (here.budget.weights, here.cache_bytes) == (engine.weight_bytes, engine.cache_bytes)


@pytest.mark.parametrize(
    ("options", "got"), [({}, 50_000_000_000), (dict(kv_cache_memory_bytes=10_000_000_000), 1_000_000_000)]
)
def test_a_gpu_that_others_hold_is_refused(monkeypatch, options, got):
    """By the engine's plan, which is made of what JAX may take, or of what the user has said."""
    there = chip("h100")
    device = SimpleNamespace(
        platform="gpu",
        device_kind=there.kind,
        compute_capability="9.0",
        local_hardware_id=0,
        memory_stats=lambda: {"bytes_limit": there.device_limit(1), "pool_bytes": got},
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "device_put", lambda array, device: array)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_ALLOCATOR", raising=False)
    family = model_class(SMALL)
    shards = family(family.parse_config(SMALL).for_shards(1), dtype=jnp.bfloat16)
    with pytest.raises(OutOfMemoryError, match="nvidia-smi"):
        plan_engine(config(**options), shards)


@pytest.mark.parametrize("pages", [1, 20])
def test_one_byte_of_cache_decides(pages):
    enough = {"kv_cache_memory_bytes": pages * PAGE_BYTES, "max_model_len": pages * 64}
    assert fit_one("small", "l4", **enough).cache_tokens == pages * 64
    less = {**enough, "kv_cache_memory_bytes": pages * PAGE_BYTES - 1}
    with pytest.raises(OutOfMemoryError):
        fit_one("small", "l4", **less)


def test_one_token_decides():
    given = {"kv_cache_memory_bytes": 20 * PAGE_BYTES}
    assert fit_one("small", "l4", **given).scheduler.max_model_len == 1280
    assert fit_one("small", "l4", max_model_len=1280, **given).requests(1280) == 1
    with pytest.raises(OutOfMemoryError, match="holds 1280 tokens in group 'full'; max_model_len=1281 needs 1281"):
        fit_one("small", "l4", max_model_len=1281, **given)


def test_one_byte_of_memory_decides():
    room = fit_one("small", "l4", max_model_len=64).budget
    taken = room.weights + room.step + room.tables
    options = {"memory_utilization": 1.0, "max_model_len": 64}
    assert fit_one("small", with_memory("l4", taken + PAGE_BYTES), **options).cache_tokens == 64
    for memory in (taken + PAGE_BYTES - 1, taken, 1):
        with pytest.raises(OutOfMemoryError):
            fit_one("small", with_memory("l4", memory), **options)


def test_requests_at_once_by_hand():
    made = fit_one("small", "l4", kv_cache_memory_bytes=20 * PAGE_BYTES)
    assert [made.requests(count) for count in (1, 64, 65, 320, 321, 1280, 1281)] == [20, 20, 10, 4, 3, 1, 0]
    windowed = fit_one("windowed", "l4", kv_cache_memory_bytes=2**30, max_num_seqs=3)
    assert windowed.requests(4096) == 3
    assert [group.window for group in windowed.groups] == [None, 256]


def test_llama_70b_needs_eight_v6e():
    large = model("llama-3.3-70b")
    options = config(max_model_len=18432)
    with pytest.raises(OutOfMemoryError, match=r"does not fit on 1 × v6e: .*weights take 141.1 GB.* 8 chips would do"):
        make_plan(large, chip("v6e"), options, None)
    made = make_plan(large, chip("v6e"), options, None, chips=8)
    assert [(mesh.data, mesh.tensor) for mesh in made.meshes] == [(1, 8)]
    assert sorted(made.refused) == ["2 × 4", "4 × 2", "8 × 1"]
    assert chips_needed(large, chip("tpu7x"), options, 1152) == 1
    with pytest.raises(OutOfMemoryError, match="With tensor_parallel_size=8 it would fit"):
        make_plan(large, chip("v6e"), options, None, chips=8, tensor=4)


def test_what_no_number_of_chips_holds():
    with pytest.raises(OutOfMemoryError, match="No number of chips would do: tensor_parallel_size is 8 at most"):
        make_plan(model("small"), with_memory("v6e", 10**7), config(), None)


def test_shards_hold_parts_and_copies():
    """Two key-value heads: halved over 2 shards, then copied; matrices go on being cut, vectors never are."""
    small = model("small")
    made = {size: fit(small, chip("l4"), config(max_model_len=4096), data=1, tensor=size) for size in (1, 2, 4, 8)}
    vectors = (2 * 2 + 1) * 512  # the norms
    matrices = {size: (each.budget.weights // 2 - vectors) * size for size, each in made.items()}
    copy = 2 * 2 * 2 * 64 * 512  # both layers' projections of keys and values
    assert [matrices[size] - matrices[1] for size in (1, 2, 4, 8)] == [0, 0, copy, 3 * copy]
    one = [fit(small, chip("l4"), config(kv_cache_memory_bytes=10**8), data=1, tensor=size) for size in (1, 2, 4)]
    pages = [each.groups[0].num_pages - 1 for each in one]
    assert pages == [10**8 // PAGE_BYTES, 2 * 10**8 // PAGE_BYTES, 2 * 10**8 // PAGE_BYTES]
    assert tensor_sizes(small.config, 64) == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"data": 3}, "data_parallel_size=3: must make up the 8 devices of 8 × v6e"),
        ({"tensor": 16}, "tensor_parallel_size=16: must make up the 8 devices"),
        ({"data": 2, "tensor": 2}, "data_parallel_size=2 and tensor_parallel_size=2: must make up"),
    ],
)
def test_meshes_that_do_not_divide_are_refused(sizes, told):
    with pytest.raises(ConfigError, match=rf"{told}.*; data × tensor may be 1 × 8, 2 × 4, 4 × 2, 8 × 1$"):
        meshes(model("small"), chip("v6e"), 8, **sizes)


def test_what_is_refused_names_meshes_that_would_do():
    """Those that the model does not divide over are not named, nor those beyond a domain."""
    with pytest.raises(ConfigError, match=r"data × tensor may be 3 × 4, 6 × 2, 12 × 1$"):
        meshes(model("small"), chip("v6e"), 12, tensor=5)
    with pytest.raises(ConfigError, match=r"on 12 × v6e data × tensor may be 3 × 4, 6 × 2, 12 × 1$"):
        meshes(model("small"), chip("v6e"), 12, data=1)
    for size in (1, 2, 4):
        assert meshes(model("small"), chip("v6e"), 12, tensor=size) == [(12 // size, size)]
    narrow = dataclasses.replace(chip("h100"), domain=4)
    with pytest.raises(
        ConfigError, match=r"joins 4 devices of h100 at most; data × tensor may be 2 × 4, 4 × 2, 8 × 1$"
    ):
        meshes(model("small"), narrow, 8, tensor=8)


def test_sizes_that_do_not_divide_the_model_are_refused():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=3: must divide .* this model allows 1, 2, 4, 8"):
        make_plan(model("small"), chip("v6e"), config(), None, chips=3, tensor=3)
    with pytest.raises(ConfigError, match="NVSwitch joins 8 devices of h100 at most"):
        make_plan(model("small"), chip("h100"), config(), None, chips=16, tensor=16)


def test_bad_lengths_are_refused():
    with pytest.raises(InvalidRequestError, match="context=4000: with 128 output tokens must be 4096 at most"):
        make_plan(model("small"), chip("h100"), config(), None, context=4000)
    with pytest.raises(ConfigError, match="max_model_len=5000: the model's limit is 4096"):
        make_plan(model("small"), chip("h100"), config(max_model_len=5000), None)
    with pytest.raises(ConfigError, match="a cache of float32 is not supported on GPU"):
        make_plan(model("small", "float32"), chip("h100"), config(), None)
    with pytest.raises(OutOfMemoryError, match="bytes are left of l4's 90%"):
        fit_one("small", "l4", kv_cache_memory_bytes=10**12)


CHIPS = st.sampled_from(sorted(chips()))
MODELS = st.sampled_from(["small", "windowed"])


def most_cache(name: str, where: Chip, count: int) -> int:
    found = [0]
    for data, tensor in meshes(model(name), where, count):
        with contextlib.suppress(OutOfMemoryError):
            found.append(fit(model(name), where, config(), data=data, tensor=tensor).cache_tokens)
    return max(found)


@given(CHIPS, MODELS, st.integers(1, 40), st.integers(0, 24), st.integers(10**8, 10**9))
def test_more_chips_never_hold_less(name, which, count, more, memory):
    where = with_memory(name, memory)
    assert most_cache(which, where, count) <= most_cache(which, where, count + more)


@given(CHIPS, MODELS, st.integers(1, 4200), st.integers(1, 4200), st.integers(5 * 10**8, 10**10))
def test_longer_requests_are_never_more(name, which, one, other, memory):
    made = fit(model(which), with_memory(name, memory), config(), data=2, tensor=2)
    short, long = sorted((one, other))
    assert made.requests(short) >= made.requests(long)
    fits = KVCache(made.groups).unfit(long) is None and long <= made.scheduler.max_model_len
    assert (made.requests(long) > 0) == fits

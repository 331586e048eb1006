"""The engine's executables for two layers of Llama 3.1 8B, compiled by libtpu for one v6e that is not there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.bench.workloads import MODEL_SHAPES
from jaxllm.core.kv_cache import CacheGroup
from jaxllm.core.scheduler_config import SchedulerConfig
from jaxllm.engine.build import abstract_leaves
from jaxllm.engine.executables import Forward, Lowering, Sample
from jaxllm.engine.resolve import EnginePlan
from jaxllm.engine.runner import layout_of
from jaxllm.engine.sampling import VARIANTS
from jaxllm.engine.step import StepShape
from jaxllm.models.registry import model_class
from sharding import DATA, TENSOR
from tests.tpu_topology import compiling_for, kernel_vmem, makers_of

LAYERS = 2
PAGES = 4000  # 1 GB a layer
HBM = 32e9


def compile_step(chip: str, key, ranks: int = 1, shards: int = 1):
    """The compiled executable of `key`, and the lowering that made it."""
    config = MODEL_SHAPES["llama-3.1-8b"] | {"num_hidden_layers": LAYERS}
    family = model_class(config)
    parsed = family.parse_config(config).for_length(18432).for_shards(shards)
    model = family(parsed, dtype=jnp.dtype(jnp.bfloat16))
    leaves, treedef = jax.tree.flatten(model)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // shards
    scheduler = SchedulerConfig(
        max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=18432, token_rungs=(256, 2048)
    )
    groups = (CacheGroup("full", PAGES, 64),)
    plan = EnginePlan(
        jnp.dtype(jnp.bfloat16), "tpu", scheduler, (8, 256), groups, model.layer_caches(), weights, 2 * PAGES * 2**18
    )
    shape = StepShape(layout_of(plan), plan.page_size, plan.backend, treedef, model.config.vocab_size, shards)
    with compiling_for(chip, (ranks, shards), (DATA, TENSOR)) as mesh:
        lowering = Lowering(shape, plan, abstract_leaves(model, mesh), mesh)
        return lowering(key).compile(), lowering


@pytest.mark.parametrize(
    "key",
    [
        Forward(8, True),
        pytest.param(Forward(256, True), marks=pytest.mark.slow),
        pytest.param(Forward(256), marks=pytest.mark.slow),
        pytest.param(Forward(2048), marks=pytest.mark.slow),
    ],
)
def test_forward(key):
    """It fits, takes its weights and caches as they lie, and gives the caches back in place."""
    compiled, lowering = compile_step("v6e", key)
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    caches = lowering.caches()
    assert not makers_of(hlo, caches[0].shape)
    large = {leaf.shape for leaf in lowering.leaves if leaf.size > 1_000_000}
    assert len(large) >= 5
    for shape in large:  # a weight may be fetched into VMEM ahead of its use: that reads it once
        copies = [line for line in makers_of(hlo, shape) if " copy(" in line or " transpose(" in line]
        assert not copies, copies
    cache_bytes = sum(np.prod(cache.shape) * cache.dtype.itemsize for cache in caches)
    weight_bytes = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in lowering.leaves)
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.argument_size_in_bytes < 1.05 * (weight_bytes + cache_bytes) + 1e8
    assert memory.temp_size_in_bytes < 1e9
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < HBM
    vmem = kernel_vmem(hlo)
    assert vmem["ragged_paged_decode"] < 8e6  # XLA keeps weights in what is left of 128 MB
    assert ("ragged_paged_prefill" in vmem) == (not key.decodes_only)


@pytest.mark.slow
def test_data_parallel_ranks():
    """Two ranks on two chips: each holds its own pages, and nothing is exchanged."""
    compiled, lowering = compile_step("v6e", Forward(256), ranks=2)
    hlo = compiled.as_text()
    _, *page = lowering.caches()[0].shape
    assert not makers_of(hlo, (PAGES, *page)) and not makers_of(hlo, (2 * PAGES, *page))
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f" {collective}" not in hlo


@pytest.mark.slow
@pytest.mark.parametrize("key", [Forward(8, True), Forward(256)])
def test_tensor_parallel_shards(key):
    """Four chips: each takes its part of weights and caches as it lies, and adds up two products a layer."""
    compiled, lowering = compile_step("v6e", key, shards=4)
    hlo = compiled.as_text()
    cache = lowering.caches()[0]
    assert not makers_of(hlo, cache.sharding.shard_shape(cache.shape))
    for leaf in lowering.leaves:
        if leaf.size > 1_000_000:
            lines = makers_of(hlo, leaf.sharding.shard_shape(leaf.shape))
            assert not [line for line in lines if " copy(" in line or " transpose(" in line]
    found = re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", hlo)
    assert found == ["all-reduce"] * (1 + 2 * LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_sampling(variant):
    compiled, _ = compile_step("v6e", Sample(256, variant))
    assert compiled.memory_analysis().temp_size_in_bytes < 2e9

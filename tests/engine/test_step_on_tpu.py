"""The engine's executables for two layers of each model, compiled by libtpu for chips that are not there.

`scripts/tpu_steps.py` does the same with whole models.
"""

import dataclasses

import pytest

from jaxllm.engine.build import abstract_leaves
from jaxllm.engine.executables import Forward, Lowering, Sample
from jaxllm.engine.sampling import VARIANTS
from jaxllm.plan import hlo, hlo_cost
from sharding import DATA, EXPERT, TENSOR
from tests.tpu_steps import CASES, Case, Engine, Measured, decode_step, measure, prefill_step, unnamed
from tests.tpu_topology import compiling_for, makers_of

LAYERS = 2
ALL = [dataclasses.replace(case, layers=LAYERS) for case in CASES]
WITH_FILLERS = {"llama-3.1-8b": 1.1, "llama-3.3-70b": 1.1, "qwen3-0.6b": 1.9}  # of the least FLOPs, at most
VMEM = {"v4": 16e6, "v5e": 128e6, "v5p": 64e6, "v6e": 128e6, "tpu7x": 64e6}


def assert_sound(found: Measured) -> None:
    """It fits, gives its caches back in place, copies no weight and no cache, and exchanges what the design names."""
    assert found.fits
    cache_bytes = sum(
        group.num_pages * group.page_size * layer.num_kv_heads * 2 * layer.head_dim * 2
        for group in found.engine.plan.groups
        for layer in found.engine.plan.layers
    )
    assert found.forward.aliased_bytes >= cache_bytes
    assert not found.forward.copies and not found.sample.copies
    assert not unnamed(found)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_decode(case):
    """Bytes, FLOPs and time of the forward pass within a tenth of what the model needs; the logits' product may give
    its logits to HBM and take them back.

    What the decode kernel multiplies with other heads' keys is not in these FLOPs, but in that time.
    """
    rows = 64
    engine = Engine(case)
    found = measure(engine, decode_step(rows, 1024))
    assert_sound(found)
    forward, sample = found.forward, found.sample
    assert forward.minimum.bytes < forward.bytes < 1.1 * forward.minimum.bytes
    assert forward.minimum.flops < forward.flops < 1.1 * forward.minimum.flops
    assert forward.flops <= forward.with_fillers.flops < WITH_FILLERS[case.model] * forward.minimum.flops
    seconds = engine.chip.ceilings.seconds
    assert seconds(forward.minimum) < seconds(forward.with_fillers) < 1.1 * seconds(forward.minimum)
    logits = rows * engine.model.config.shard_vocab * 4
    assert sample.bytes < 1.01 * sample.minimum.bytes + 2 * logits
    assert sample.flops < 1.01 * sample.minimum.flops
    assert forward.vmem.keys() == {"ragged_paged_decode"}
    assert forward.vmem["ragged_paged_decode"] < VMEM[case.chip] / 5  # XLA fetches weights into the rest


@pytest.mark.parametrize("case", ALL, ids=str)
def test_prefill(case):
    """Bytes within a tenth of what weights, cache and activations must move; FLOPs within a tenth of the floor, but
    that the end of the last layer goes over all slots."""
    found = measure(Engine(case), prefill_step(1, 512 if case.model == "qwen3-0.6b" else 2048))
    assert_sound(found)
    padding = 2 * found.engine.plan.scheduler.max_num_seqs * found.engine.cost.active_weights / LAYERS
    assert found.minimum.flops < found.work.flops < 1.1 * found.minimum.flops + padding
    assert found.minimum.bytes < found.work.bytes < 1.1 * found.minimum_with_activations.bytes


@pytest.mark.slow
def test_data_parallel_ranks():
    """Two ranks on two chips: each holds its own pages, and nothing is exchanged."""
    engine = Engine(ALL[0])
    with compiling_for("v6e", (2, 1, 1), (DATA, EXPERT, TENSOR)) as mesh:
        lowering = Lowering(engine.shape, engine.plan, abstract_leaves(engine.model, mesh), mesh)
        text = lowering(Forward(256)).compile().as_text()
    both, *page = lowering.caches()[0].shape
    assert not makers_of(text, (both // 2, *page)) and not makers_of(text, (both, *page))
    assert not hlo_cost.collectives(hlo.parse(text))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_sampling(variant):
    compiled, _ = Engine(Case("llama-3.1-8b", "v6e", layers=LAYERS)).compile(Sample(256, variant))
    assert compiled.memory_analysis().temp_size_in_bytes < 2e9

"""The engine's executables for two layers of each model, compiled by libtpu for chips that are not there.

`scripts/tpu_steps.py` does the same with whole models.
"""

import dataclasses

import pytest

from jaxllm.engine.build import abstract_leaves
from jaxllm.engine.executables import Forward, Lowering, Sample
from jaxllm.engine.sampling import VARIANTS
from jaxllm.plan import hlo, hlo_cost
from pallas_kernels.ragged_paged_attention.tpu_sizes import LANES
from sharding import DATA, EXPERT, TENSOR
from tests.tpu_steps import (
    CASES,
    Case,
    Engine,
    Measured,
    Step,
    decode_step,
    measure,
    prefill_step,
    ragged_step,
    unnamed,
)
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
    """Bytes, FLOPs and time of the forward pass within a tenth of what the model needs; no logits are written.

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
    assert sample.bytes < 1.01 * sample.minimum.bytes + rows * (2 * LANES * 8 + engine.model.config.hidden_size * 8)
    assert sample.flops < 1.01 * sample.minimum.flops
    assert forward.vmem.keys() == {"ragged_paged_decode"} | ({"qk_norm_rope"} if case.chip == "v5p" else set())
    assert sample.vmem.keys() == {f"argmax_projection_{rows}"}
    assert forward.vmem["ragged_paged_decode"] < VMEM[case.chip] / 5  # XLA fetches weights into the rest


def assert_prefill(found: Measured) -> None:
    """Bytes within a tenth of what weights, cache and activations must move; FLOPs within a tenth of the floor, but
    that the end of the last layer goes over all slots."""
    assert_sound(found)
    padding = 2 * found.engine.plan.scheduler.max_num_seqs * found.engine.cost.active_weights / LAYERS
    assert found.minimum.flops < found.work.flops < 1.1 * found.minimum.flops + padding
    assert found.minimum.bytes < found.work.bytes < 1.1 * found.minimum_with_activations.bytes


def step_of(case: Case) -> Step:
    if case.model != "qwen3-0.6b":
        return prefill_step(1, 2048)
    return ragged_step(64, 32) if case.chip == "v5e" else prefill_step(1, 512)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_prefill(case):
    assert_prefill(measure(Engine(case), step_of(case)))


SHORT = (prefill_step(64, 32), ragged_step(64, 32), prefill_step(8, 256), decode_step(256, 127))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_of_short_rows(case):
    """Of whole models: what attention moves and multiplies in vain is less than a tenth of what the step needs."""
    engine = Engine(case)
    layer, layers = engine.plan.layers[0], len(engine.plan.layers)
    token = layer.num_kv_heads * 2 * layer.head_dim * 2
    heads = engine.model.config.num_attention_heads // case.tensor
    for step in SHORT:
        least_bytes = token * (sum(step.kv_lens) + (0 if step.decodes_only else step.num_tokens))
        pairs = sum(end * (end + 1) // 2 - start * (start + 1) // 2 for start, end in step.spans)
        kernels = [found for name, found in engine.traffic(step).items() if name.startswith("ragged_paged")]
        moved = sum(found.read + found.written for found in kernels) - least_bytes
        multiplied = sum(found.flops for found in kernels) - 4 * heads * layer.head_dim * pairs
        least = engine.minimum_with_activations(step)
        assert 0 <= moved * layers < 0.075 * least.bytes, step
        assert 0 <= multiplied * layers < 0.1 * least.flops, step


@pytest.mark.slow
@pytest.mark.parametrize("step", SHORT[:-1], ids=lambda step: step.name)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_short_prompts(case, step):
    assert_prefill(measure(Engine(case), step))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_decode_of_many_short_rows(case):
    found = measure(Engine(case), SHORT[-1])
    assert_sound(found)
    assert found.minimum.bytes < found.work.bytes < 1.1 * found.minimum_with_activations.bytes
    assert found.minimum.flops < found.work.flops < 1.1 * found.minimum.flops


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

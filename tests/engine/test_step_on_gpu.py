"""The engine's step lowers for NVIDIA GPUs that are not there, its kernels over each tensor-parallel shard's heads."""

import pickle
import re

import jax
import pytest

from jaxllm.engine.executables import FORWARD_DONATES, Forward, Lowering
from jaxllm.engine.lowering_process import Exporting, SharedLowering, _Process, _Task
from sharding import TENSOR
from tests.gpu_steps import PUBLISHED, step_arguments


class _ForCuda:
    """A jitted function that is lowered for another platform than the one it stands on."""

    def __init__(self, jitted):
        self._jitted = jitted

    def lower(self, *arguments):
        return self._jitted.trace(*arguments).lower(lowering_platforms=("cuda",))


class _CudaLowering(Lowering):
    def _sharded(self, *arguments, **options):
        return _ForCuda(super()._sharded(*arguments, **options))


def _check(text: str, key: Forward, shards: int) -> None:
    # decode and merge, norms; whole batches also write, prefill and the gated projection, and where a shard's heads are
    # a multiple of eight the rotation
    expected = 5 if key.decodes_only else 8 + (shards == 1)
    assert len(re.findall(r"custom_call @mosaic_gpu_v2", text)) == expected
    assert len(re.findall(r"stablehlo\.all_reduce", text)) == (3 if shards > 1 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 4, 8])  # 8: one key-value head a shard
@pytest.mark.parametrize("key", [Forward(8, True), Forward(256)])
def test_forward(key, shards):
    """All kernels run under `shard_map`, on local shapes; two sums a layer and one for the embeddings."""
    _check(_CudaLowering(*step_arguments(shards))(key).as_text(), key, shards)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "shards"), [(Forward(2, True), 8), (Forward(256), 2), (Forward(2048), 2)])
def test_forward_whose_shards_deal_out_the_stream(key, shards):
    """One kernel for a sum and the norm behind it, in the place of both; those of chosen rows stay apart. Of few rows
    only the first one exchanges addresses, so that XLA brings the devices together."""
    text = Exporting(*step_arguments(shards, TENSOR), "cuda")(key).exported.mlir_module()
    assert text.count("uses_xla_collective_metadata = true") == 1
    # decode, merge, three sums with norms; whole batches also write, prefill and the gated projection
    assert len(re.findall(r"custom_call @mosaic_gpu_v2", text)) == (5 if key.decodes_only else 8)
    assert len(re.findall(r"stablehlo\.all_reduce", text)) == (3 if key.num_tokens == 2048 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 4])
def test_forward_of_another_process(shards):
    """Kernels pass through `jax.export`, and the state that the step donates is still its to reuse."""
    key, arguments = Forward(8, True), step_arguments(shards)
    program = pickle.loads(pickle.dumps(Exporting(*arguments, "cuda")(key)))
    lowering = SharedLowering(*arguments, processes=0)
    jitted = lowering._around(program)
    text = jitted.trace(*lowering.forward_arguments()).lower(lowering_platforms=("cuda",)).as_text()
    _check(text, key, shards)
    assert len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", text)) == len(
        jax.tree.leaves([lowering.forward_arguments()[at] for at in FORWARD_DONATES])
    )


@pytest.mark.slow
def test_a_process_names_the_devices_that_a_kernel_sums_over():
    shape, plan, leaves, mesh = step_arguments(2, TENSOR)
    parts = [(leaf.shape, leaf.dtype, leaf.sharding.spec) for leaf in leaves]
    process = _Process(pickle.dumps(_Task(shape, plan, parts, mesh, "cuda", {})))
    program = process.lower(Forward(2048))
    process.close()
    assert not isinstance(program, str), program
    text = program.exported.mlir_module()
    assert len(re.findall(r'xla_replica_ids = "0,1"', text)) == text.count("xla_replica_ids") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("key", [Forward(8, True), Forward(256), Forward(2048)])
def test_published_models_lower(name, key):
    """Interpreters take tiles and slices that Mosaic refuses. Two layers: of every kind, where there are two."""
    lowered = _CudaLowering(*step_arguments(1, hf=PUBLISHED[name], layers=2))(key)
    assert "ragged_paged_decode" in lowered.as_text()

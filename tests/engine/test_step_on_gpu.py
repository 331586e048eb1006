"""The engine's step lowers for NVIDIA GPUs that are not there, its kernels over each tensor-parallel shard's heads."""

import pickle
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxllm.bench.workloads import MODEL_SHAPES
from jaxllm.core.kv_cache import CacheGroup
from jaxllm.core.scheduler_config import SchedulerConfig
from jaxllm.engine.build import abstract_leaves
from jaxllm.engine.executables import FORWARD_DONATES, Forward, Lowering
from jaxllm.engine.lowering_process import Exporting, SharedLowering, _Process, _Task
from jaxllm.engine.resolve import EnginePlan
from jaxllm.engine.runner import layout_of
from jaxllm.engine.step import StepShape
from jaxllm.models.registry import model_class
from sharding import DATA, TENSOR


class _ForCuda:
    """A jitted function that is lowered for another platform than the one it stands on."""

    def __init__(self, jitted):
        self._jitted = jitted

    def lower(self, *arguments):
        return self._jitted.trace(*arguments).lower(lowering_platforms=("cuda",))


class _CudaLowering(Lowering):
    def _sharded(self, *arguments, **options):
        return _ForCuda(super()._sharded(*arguments, **options))


def _arguments(shards: int, stream_axis: str | None = None, hf=MODEL_SHAPES["llama-3.1-8b"], layers: int = 1) -> tuple:
    """Of a `Lowering` of so many layers of a model, Llama 3.1 8B."""
    config = hf | {"num_hidden_layers": layers}
    family = model_class(config)
    parsed = family.parse_config(config).for_length(4096).for_shards(shards)
    model = family(parsed, dtype=jnp.dtype(jnp.bfloat16))
    scheduler = SchedulerConfig(
        max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=4096, token_rungs=(256, 2048)
    )
    windows = sorted({cache.window for cache in model.layer_caches()}, key=lambda window: (window is not None, window))
    groups = tuple(CacheGroup(str(window), 400, 64, window=window) for window in windows)
    plan = EnginePlan(jnp.dtype(jnp.bfloat16), "gpu", scheduler, (8, 256), groups, model.layer_caches(), 0, 0)
    shape = StepShape(layout_of(plan), 64, "gpu", jax.tree.structure(model), parsed.vocab_size, shards, stream_axis)
    mesh = AbstractMesh((1, shards), (DATA, TENSOR), axis_types=(AxisType.Auto,) * 2)
    return shape, plan, abstract_leaves(model, mesh), mesh


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
    _check(_CudaLowering(*_arguments(shards))(key).as_text(), key, shards)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "shards"), [(Forward(2, True), 8), (Forward(256), 2), (Forward(2048), 2)])
def test_forward_whose_shards_deal_out_the_stream(key, shards):
    """One kernel for a sum and the norm behind it, in the place of both; those of chosen rows stay apart."""
    text = Exporting(*_arguments(shards, TENSOR), "cuda")(key).exported.mlir_module()
    # decode, merge, three sums with norms; whole batches also write, prefill and the gated projection
    assert len(re.findall(r"custom_call @mosaic_gpu_v2", text)) == (5 if key.decodes_only else 8)
    assert len(re.findall(r"stablehlo\.all_reduce", text)) == (3 if key.num_tokens == 2048 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 4])
def test_forward_of_another_process(shards):
    """Kernels pass through `jax.export`, and the state that the step donates is still its to reuse."""
    key, arguments = Forward(8, True), _arguments(shards)
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
    shape, plan, leaves, mesh = _arguments(2, TENSOR)
    parts = [(leaf.shape, leaf.dtype, leaf.sharding.spec) for leaf in leaves]
    process = _Process(pickle.dumps(_Task(shape, plan, parts, mesh, "cuda", {})))
    program = process.lower(Forward(2, True))
    process.close()
    assert not isinstance(program, str), program
    text = program.exported.mlir_module()
    assert len(re.findall(r'xla_replica_ids = "0,1"', text)) == text.count("xla_replica_ids") == 3


def _published(family: str, hidden: int, mlp: int, heads: int, kv_heads: int, dim: int | None = None, **more) -> dict:
    """A config.json; the vocabulary, which decides nothing here, is small."""
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "vocab_size": 4096, "rms_norm_eps": 1e-6}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim or hidden // heads}
    places = {"max_position_embeddings": 8192, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False}
    return {"architectures": [f"{family}ForCausalLM"], **sizes, **places, **more}


_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 1024, "query_pre_attn_scalar": 256}
PUBLISHED = {
    "SmolLM2 135M": _published("Llama", 576, 1536, 9, 3),
    "SmolLM2 360M": _published("Llama", 960, 2560, 15, 5),
    "Llama 3.2 1B": _published("Llama", 2048, 8192, 32, 8),
    "Llama 3.2 3B": _published("Llama", 3072, 8192, 24, 8),
    "Llama 3.3 70B": _published("Llama", 8192, 28672, 64, 8),
    "Mistral Nemo": _published("Mistral", 5120, 14336, 32, 8, 128),
    "Qwen 2.5 0.5B": _published("Qwen2", 896, 4864, 14, 2),
    "Qwen 2.5 1.5B": _published("Qwen2", 1536, 8960, 12, 2),
    "Qwen 2.5 7B": _published("Qwen2", 3584, 18944, 28, 4),
    "Qwen 2.5 32B": _published("Qwen2", 5120, 27648, 40, 8),
    "Qwen 3 0.6B": _published("Qwen3", 1024, 3072, 16, 8, 128),
    "Qwen 3 4B": _published("Qwen3", 2560, 9728, 32, 8, 128),
    "Qwen 3 32B": _published("Qwen3", 5120, 25600, 64, 8, 128),
    "Gemma 2 2B": _published("Gemma2", 2304, 9216, 8, 4, 256, **_GEMMA),
    "Gemma 2 27B": _published("Gemma2", 4608, 36864, 32, 16, 128, **_GEMMA | {"query_pre_attn_scalar": 144}),
    "Gemma 3 1B": _published("Gemma3", 1152, 6912, 4, 1, 256, **_GEMMA),
    "Phi 3 mini": _published("Phi3", 3072, 8192, 32, 32),
    "Phi 4": _published("Phi3", 5120, 17920, 40, 10),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("key", [Forward(8, True), Forward(256), Forward(2048)])
def test_published_models_lower(name, key):
    """Interpreters take tiles and slices that Mosaic refuses. Two layers: of every kind, where there are two."""
    lowered = _CudaLowering(*_arguments(1, hf=PUBLISHED[name], layers=2))(key)
    assert "ragged_paged_decode" in lowered.as_text()

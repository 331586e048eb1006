"""Steps of models as the engine lowers them for GPUs that are not there."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from jaxllm.bench.workloads import MODEL_SHAPES
from jaxllm.core.kv_cache import CacheGroup
from jaxllm.core.scheduler_config import SchedulerConfig
from jaxllm.engine.build import abstract_leaves
from jaxllm.engine.resolve import EnginePlan
from jaxllm.engine.runner import layout_of
from jaxllm.engine.step import StepShape
from jaxllm.models.registry import model_class
from sharding import DATA, TENSOR


def step_arguments(
    shards: int, stream_axis: str | None = None, hf=MODEL_SHAPES["llama-3.1-8b"], layers: int = 1
) -> tuple:
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


def published(family: str, hidden: int, mlp: int, heads: int, kv_heads: int, dim: int | None = None, **more) -> dict:
    """A config.json; the vocabulary, which decides nothing here, is small."""
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "vocab_size": 4096, "rms_norm_eps": 1e-6}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim or hidden // heads}
    places = {"max_position_embeddings": 8192, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False}
    return {"architectures": [f"{family}ForCausalLM"], **sizes, **places, **more}


GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 1024, "query_pre_attn_scalar": 256}
PUBLISHED = {
    "SmolLM2 135M": published("Llama", 576, 1536, 9, 3),
    "SmolLM2 360M": published("Llama", 960, 2560, 15, 5),
    "Llama 3.2 1B": published("Llama", 2048, 8192, 32, 8),
    "Llama 3.2 3B": published("Llama", 3072, 8192, 24, 8),
    "Llama 3.3 70B": published("Llama", 8192, 28672, 64, 8),
    "Mistral Nemo": published("Mistral", 5120, 14336, 32, 8, 128),
    "Qwen 2.5 0.5B": published("Qwen2", 896, 4864, 14, 2),
    "Qwen 2.5 1.5B": published("Qwen2", 1536, 8960, 12, 2),
    "Qwen 2.5 7B": published("Qwen2", 3584, 18944, 28, 4),
    "Qwen 2.5 32B": published("Qwen2", 5120, 27648, 40, 8),
    "Qwen 3 0.6B": published("Qwen3", 1024, 3072, 16, 8, 128),
    "Qwen 3 4B": published("Qwen3", 2560, 9728, 32, 8, 128),
    "Qwen 3 32B": published("Qwen3", 5120, 25600, 64, 8, 128),
    "Gemma 2 2B": published("Gemma2", 2304, 9216, 8, 4, 256, **GEMMA),
    "Gemma 2 27B": published("Gemma2", 4608, 36864, 32, 16, 128, **GEMMA | {"query_pre_attn_scalar": 144}),
    "Gemma 3 1B": published("Gemma3", 1152, 6912, 4, 1, 256, **GEMMA),
    "Phi 3 mini": published("Phi3", 3072, 8192, 32, 32),
    "Phi 4": published("Phi3", 5120, 17920, 40, 10),
}

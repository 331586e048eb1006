"""Models for plans: shapes alone."""

import functools
from typing import Any

from jaxllm.bench.workloads import MODEL_SHAPES
from jaxllm.plan.fit import Model, read_model

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
WINDOWED = {
    **SMALL,
    "architectures": ["Gemma2ForCausalLM"],
    "num_hidden_layers": 4,
    "sliding_window": 256,
    "query_pre_attn_scalar": 64,
}
PAGE_BYTES = 2 * 2 * 2 * 64 * 64 * 2  # two layers' keys and values of 64 tokens, two heads of 64 in bfloat16


@functools.cache
def model(name: str, dtype: str = "bfloat16") -> Model:
    hf = {"small": SMALL, "windowed": WINDOWED}.get(name) or MODEL_SHAPES[name]
    return read_model(name, hf, dtype)

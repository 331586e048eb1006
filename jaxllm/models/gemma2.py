"""Gemma 2 (Gemma team, 2024): norms before and after each half of a layer, soft caps, every other layer sliding."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxllm.models.config import DecoderConfig, activation_of, integer, layer_windows, positive_float
from jaxllm.models.decoder import CausalLM, DecoderLayer
from jaxllm.models.layers import RMSNorm, linear
from jaxllm.models.metadata import StepMetadata

DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def gemma_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma 2 and 3 share. Raises UnsupportedModelError."""
    cap, final_cap = hf["attn_logit_softcapping"], hf["final_logit_softcapping"]
    return dict(
        activation=activation_of(hf, "hidden_activation"),
        attention_scale=positive_float(hf, "query_pre_attn_scalar") ** -0.5,
        attention_bias=bool(hf.get("attention_bias")),
        attention_out_bias=bool(hf.get("attention_bias")),
        norm_unit_offset=True,
        attention_cap=None if cap is None else positive_float(hf, "attn_logit_softcapping"),
        final_cap=None if final_cap is None else positive_float(hf, "final_logit_softcapping"),
        embedding_scale=integer(hf, "hidden_size") ** 0.5,
    )


class GemmaLayer(DecoderLayer):
    """Attention and MLP, each between two norms, each added to what came in."""

    deals_out_stream = False  # what is added is a norm of the sum

    def __init__(self, config: DecoderConfig, *, window: int | None, group: int, dtype):
        super().__init__(config, window=window, group=group, dtype=dtype)
        self.pre_feedforward_layernorm = RMSNorm.over_hidden(config, dtype=dtype)
        self.post_feedforward_layernorm = RMSNorm.over_hidden(config, dtype=dtype)

    def finish(self, stream: jax.Array, attended: jax.Array, metadata: StepMetadata) -> tuple[jax.Array, jax.Array]:
        update = self.post_attention_layernorm(linear(attended, self.self_attn.o_proj, metadata.linear))
        stream, x = self.pre_feedforward_layernorm.add(stream, update, metadata)
        x = linear(self.mlp(x, metadata), self.mlp.down_proj, metadata.linear)
        return stream, self.post_feedforward_layernorm(x)


class Gemma2ForCausalLM(CausalLM):
    """The decoder of Gemma's layers."""

    layer_type = GemmaLayer

    @classmethod
    def parse_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        hf = DEFAULTS | dict(hf)
        windows = layer_windows(hf, lambda layer: layer % 2 == 0)
        return DecoderConfig.from_hf(hf, windows=windows, **gemma_fields(hf))

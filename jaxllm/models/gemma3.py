"""Gemma 3, text (Gemma team, 2025): Gemma 2 with normalized queries and keys instead of soft caps, five sliding layers
to each full one, and another rotary base in them."""

from collections.abc import Mapping
from typing import Any

from jaxllm.errors import UnsupportedModelError
from jaxllm.models.config import FULL, SLIDING, DecoderConfig, integer, layer_windows, rope_parameters
from jaxllm.models.decoder import CausalLM
from jaxllm.models.gemma2 import GemmaLayer, gemma_fields

DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}


class Gemma3ForCausalLM(CausalLM):
    """The decoder of Gemma's layers with q_norm and k_norm."""

    layer_type = GemmaLayer

    @classmethod
    def parse_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        hf = DEFAULTS | dict(hf)
        if hf["attn_logit_softcapping"] is not None:  # a field that transformers reads and never uses
            raise UnsupportedModelError(
                f"config.json: attn_logit_softcapping={hf['attn_logit_softcapping']!r} is not supported in Gemma 3"
            )
        # the pattern has been written under both names
        period = integer(hf, "sliding_window_pattern", integer(hf, "_sliding_window_pattern", 6))
        windows = layer_windows(hf, lambda layer: (layer + 1) % period != 0)
        return DecoderConfig.from_hf(_with_nested_rope(hf), windows=windows, qk_norm=True, **gemma_fields(hf))


def _with_nested_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters by layer type: rope_scaling and rope_theta are for full layers, rope_local_base_freq for sliding
    ones."""
    nested = {kind: rope_parameters({**hf, "rope_scaling": None, "rope_theta": None}, kind) for kind in (FULL, SLIDING)}
    nested[FULL] |= rope_parameters({**hf, "rope_parameters": None, "rope_theta": None}, FULL)
    nested[FULL].setdefault("rope_theta", hf["rope_theta"])
    nested[SLIDING].setdefault("rope_theta", hf["rope_local_base_freq"])
    return {**hf, "rope_scaling": None, "rope_parameters": nested}

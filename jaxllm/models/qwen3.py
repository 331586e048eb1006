"""Qwen3 (Qwen team, 2025): Llama with normalized queries and keys, and heads of a width of their own."""

from collections.abc import Mapping
from typing import Any

from jaxllm.models import qwen2
from jaxllm.models.config import DecoderConfig
from jaxllm.models.decoder import CausalLM

DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}


class Qwen3ForCausalLM(CausalLM):
    """The plain decoder with q_norm and k_norm."""

    @classmethod
    def parse_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        hf = DEFAULTS | dict(hf)
        bias = bool(hf.get("attention_bias"))
        return DecoderConfig.from_hf(
            hf, windows=qwen2.qwen_windows(hf), attention_bias=bias, attention_out_bias=bias, qk_norm=True
        )

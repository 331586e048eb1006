"""Llama 2 and 3, SmolLM2, and what else calls itself LlamaForCausalLM (Touvron et al., 2023)."""

from collections.abc import Mapping
from typing import Any

from jaxllm.models.config import DecoderConfig
from jaxllm.models.decoder import CausalLM


class LlamaForCausalLM(CausalLM):
    """The plain decoder: nothing to add."""

    @classmethod
    def parse_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        bias = bool(hf.get("attention_bias"))
        return DecoderConfig.from_hf(
            hf, attention_bias=bias, attention_out_bias=bias, mlp_bias=bool(hf.get("mlp_bias"))
        )

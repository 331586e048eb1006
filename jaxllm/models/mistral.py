"""Mistral (Jiang et al., 2023): Llama with a sliding window in every layer, or in none."""

from collections.abc import Mapping
from typing import Any

from jaxllm.errors import UnsupportedModelError
from jaxllm.models.config import DecoderConfig, layer_windows
from jaxllm.models.decoder import CausalLM

DEFAULTS = {"sliding_window": 4096, "max_position_embeddings": 131072, "num_key_value_heads": 8}


class MistralForCausalLM(CausalLM):
    """The plain decoder with windows."""

    @classmethod
    def parse_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        hf = DEFAULTS | dict(hf)
        windows = layer_windows(hf, lambda layer: hf["sliding_window"] is not None)
        if len(set(windows)) > 1:  # transformers' Mistral would slide in all of them; Ministral mixes
            raise UnsupportedModelError("config.json: layer_types must be all alike for MistralForCausalLM")
        return DecoderConfig.from_hf(hf, windows=windows)

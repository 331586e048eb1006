"""Qwen2 and Qwen2.5 (Qwen team, 2024): Llama with biases on queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from jaxllm.models.config import DecoderConfig, integer, layer_windows
from jaxllm.models.decoder import CausalLM

DEFAULTS = {"max_position_embeddings": 32768, "sliding_window": 4096}


def qwen_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """With use_sliding_window, the layers from max_window_layers on slide."""
    hf = dict(hf)
    if not hf.get("use_sliding_window"):
        hf["sliding_window"] = None
    first = integer(hf, "max_window_layers", 28, minimum=0)
    return layer_windows(hf, lambda layer: hf["sliding_window"] is not None and layer >= first)


class Qwen2ForCausalLM(CausalLM):
    """The plain decoder with biases."""

    @classmethod
    def parse_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        hf = DEFAULTS | dict(hf)
        return DecoderConfig.from_hf(hf, windows=qwen_windows(hf), attention_bias=True)

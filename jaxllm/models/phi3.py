"""Phi-3 and Phi-4 mini (Abdin et al., 2024): Llama with fused projections, LongRoPE and partly rotated heads."""

from collections.abc import Mapping
from typing import Any

from jaxllm.models.config import FULL, DecoderConfig, layer_windows, rope_parameters
from jaxllm.models.decoder import CausalLM

DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": None,
}


class Phi3ForCausalLM(CausalLM):
    """The plain decoder over a checkpoint with qkv_proj and gate_up_proj."""

    @classmethod
    def parse_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        hf = DEFAULTS | dict(hf)
        rope = rope_parameters(hf, FULL)
        if (rope.get("rope_type") or rope.get("type")) in ("su", "yarn"):  # LongRoPE's names in older files
            rope["rope_type"] = "longrope"
        hf |= {"rope_scaling": None, "rope_parameters": rope}
        windows = layer_windows(hf, lambda layer: hf["sliding_window"] is not None)
        return DecoderConfig.from_hf(hf, partial_rotary=True, windows=windows, fused_projections=True)

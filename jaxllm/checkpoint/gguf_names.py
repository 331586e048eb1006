"""GGUF tensor names and layouts as Hugging Face's.

The names are those of `gguf-py/gguf/tensor_mapping.py`; what `convert_hf_to_gguf.py` does to values is undone here:
Q and K of llama files are permuted for interleaved rotary pairs, Gemma's norms are stored with 1 added.
"""

import dataclasses
import re

import numpy as np

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Where an architecture gives a name another meaning: Gemma norms before and after each half, Phi-3 fuses gate and up.
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OVERRIDES = {"gemma2": _GEMMA, "gemma3": _GEMMA, "phi3": {"ffn_up": "mlp.gate_up_proj"}}
# Rope factors are read into the config.
_IGNORED = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_0-9]+)\.(weight|bias)")


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How a GGUF tensor becomes a Hugging Face one.

    Attributes:
      heads: row i of the file is row `row_order(rows)[i]` if above 0: that many heads of interleaved pairs.
      offset: added to every value.
    """

    heads: int = 0
    offset: float = 0.0

    def row_order(self, num_rows: int) -> np.ndarray | None:
        """Where each of the file's rows goes, int64 [num_rows]; None if they stand in order.

        In a head of dimension d the file's rows are 0, d/2, 1, d/2 + 1, …: the pairs that rotate together.
        """
        if not self.heads:
            return None
        return np.arange(num_rows).reshape(self.heads, 2, -1).swapaxes(1, 2).ravel()


def is_ignored(name: str) -> bool:
    """Whether this tensor is no weight: its content is already in the config."""
    return name in _IGNORED


def hugging_face_name(name: str, arch: str) -> str:
    """The Hugging Face name of a GGUF tensor; the GGUF name itself if it has none, so that errors can show it."""
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    layer, part, kind = match.groups()
    mapped = _OVERRIDES.get(arch, {}).get(part) or _LAYER.get(part)
    return name if mapped is None else f"model.layers.{layer}.{mapped}.{kind}"


def layout(name: str, arch: str, num_heads: int, num_kv_heads: int) -> Layout:
    """What has to be undone to the GGUF tensor of this name."""
    if arch == "llama" and ".attn_q." in name:
        return Layout(heads=num_heads)
    if arch == "llama" and ".attn_k." in name:
        return Layout(heads=num_kv_heads)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return Layout(offset=-1.0)
    return Layout()

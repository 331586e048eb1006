"""Tiny GGUF models for tests, written with the `gguf` package the way llama.cpp's converter writes them."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB = 64, 96, 2, 4, 2, 48
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


def head_dim(arch: str) -> int:
    """Qwen3 and Gemma choose it apart from hidden size / heads."""
    return 32 if arch in ("qwen3", "gemma2", "gemma3") else HIDDEN // HEADS


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to Q and K of llama models: halves of a head become interleaved pairs."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def hugging_face_weights(arch: str, seed: int = 0, tied: bool = False) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face names, [out, in]."""
    rng = np.random.default_rng(seed)
    dim = head_dim(arch)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        part: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
            "self_attn.o_proj.weight": (HIDDEN, HEADS * dim),
            "mlp.down_proj.weight": (HIDDEN, FFN),
        }
        if arch == "phi3":
            part["self_attn.qkv_proj.weight"] = ((HEADS + 2 * KV_HEADS) * dim, HIDDEN)
            part["mlp.gate_up_proj.weight"] = (2 * FFN, HIDDEN)
        else:
            for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                part[f"self_attn.{name}_proj.weight"] = (heads * dim, HIDDEN)
                if arch == "qwen2":
                    part[f"self_attn.{name}_proj.bias"] = (heads * dim,)
            part["mlp.gate_proj.weight"] = part["mlp.up_proj.weight"] = (FFN, HIDDEN)
        if arch in ("qwen3", "gemma3"):
            part["self_attn.q_norm.weight"] = part["self_attn.k_norm.weight"] = (dim,)
        if arch in ("gemma2", "gemma3"):
            part["pre_feedforward_layernorm.weight"] = part["post_feedforward_layernorm.weight"] = (HIDDEN,)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in part.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensor(name: str, value: np.ndarray, arch: str) -> tuple[str, np.ndarray]:
    """Name and value as the converter stores them."""
    gemma = arch.startswith("gemma")
    if gemma and name.endswith("norm.weight"):
        value = value + np.float32(1)
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{kind}", value
    _, _, layer, part = stem.split(".", 3)
    if arch == "llama" and part == "self_attn.q_proj":
        value = permute(value, HEADS)
    if arch == "llama" and part == "self_attn.k_proj":
        value = permute(value, KV_HEADS)
    norms = {"post_attention_layernorm": "post_attention_norm" if gemma else "ffn_norm"}
    norms |= {"pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}
    return f"blk.{layer}.{ {**_NAMES, **norms}[part] }.{kind}", value


def add_metadata(writer: gguf.GGUFWriter, arch: str, extra: dict[str, Any]) -> None:
    """What a config needs; `extra` adds to it or replaces it, None removes."""
    dim = head_dim(arch)
    values: dict[str, Any] = {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 4096,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": FFN,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 500000.0,
        f"{arch}.rope.dimension_count": dim,
        f"{arch}.vocab_size": VOCAB,
    }
    if arch in ("qwen3", "gemma2", "gemma3"):
        values |= {f"{arch}.attention.key_length": dim, f"{arch}.attention.value_length": dim}
    if arch in ("gemma2", "gemma3"):
        values[f"{arch}.attention.sliding_window"] = 512
    if arch == "gemma2":
        values |= {"gemma2.attn_logit_softcapping": 40.0, "gemma2.final_logit_softcapping": 20.0}
    for key, value in (values | extra).items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)


def write_model(
    path: Path,
    arch: str,
    weights: dict[str, np.ndarray] | None = None,
    extra: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    quantization: gguf.GGMLQuantizationType | None = None,
) -> dict[str, np.ndarray]:
    """Writes a tiny model; returns its weights under Hugging Face names, before quantization."""
    weights = hugging_face_weights(arch) if weights is None else weights
    writer = gguf.GGUFWriter(str(path), arch)
    add_metadata(writer, arch, extra or {})
    for name, value in weights.items():
        stored, value = gguf_tensor(name, value, arch)
        if quantization is not None and value.ndim == 2:
            writer.add_tensor(stored, gguf.quants.quantize(value, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(stored, value)
    for name, value in (extra_tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def llama3_rope_factors(dim: int, theta: float, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """The rope_freqs tensor, by the loop of the converter."""
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)

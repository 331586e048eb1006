"""Rotary position embeddings (Su et al., 2021) in Hugging Face's half-rotated order, with their context scalings."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import UnsupportedModelError


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of one rotary embedding.

    Attributes:
      inverse_frequencies: radians a token for each rotated pair; 2 * len(...) leading dims of a head are rotated.
      long_inverse_frequencies: those used once positions pass `original_max_position` (longrope), or None.
      original_max_position: tokens the model was first trained on; only longrope looks at it.
      scale: what cosines and sines are multiplied by (longrope and yarn's attention factor).
    """

    inverse_frequencies: tuple[float, ...]
    long_inverse_frequencies: tuple[float, ...] | None = None
    original_max_position: int = 0
    scale: float = 1.0

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], head_dim: int, max_position: int, *, theta: float | None = None) -> "Rope":
        """Reads rope_theta, partial_rotary_factor and rope_scaling (or transformers 5's rope_parameters).

        Raises UnsupportedModelError for a rope_type other than default, linear, llama3 and longrope.
        """
        scaling = dict(hf.get("rope_parameters") or {}) | dict(hf.get("rope_scaling") or {})
        base = theta or scaling.get("rope_theta") or hf.get("rope_theta") or 10000.0
        partial = scaling.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
        rotated = int(head_dim * partial)
        frequencies = 1.0 / base ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated)
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind == "default":
            return cls(tuple(frequencies))
        if kind == "linear":
            return cls(tuple(frequencies / scaling["factor"]))
        if kind == "llama3":
            return cls(tuple(_llama3(frequencies, scaling)))
        if kind == "longrope":
            return _longrope(frequencies, scaling, hf, max_position)
        raise UnsupportedModelError(
            f"rope_type={kind!r} is not supported; supported are default, linear, llama3 and longrope"
        )

    def tables(self, positions: jax.Array, kv_length: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines, float32[T, rotated / 2] each, of int32[T] positions.

        `kv_length`, int32[T], is the length of each token's sequence so far: longrope changes tables by it.
        """
        frequencies = jnp.asarray(self.inverse_frequencies, jnp.float32)
        if self.long_inverse_frequencies is not None:
            assert kv_length is not None
            long = jnp.asarray(self.long_inverse_frequencies, jnp.float32)
            frequencies = jnp.where((kv_length > self.original_max_position)[:, None], long, frequencies)
        angles = positions.astype(jnp.float32)[:, None] * frequencies
        return jnp.cos(angles) * self.scale, jnp.sin(angles) * self.scale


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the leading 2 * R dims of each head: x is [T, heads, head_dim], the tables [T, R]; in float32."""
    cos, sin = (table[:, None, :] for table in tables)
    half = cos.shape[-1]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x.dtype) for part in rotated] + [x[..., 2 * half :]], axis=-1)


def _llama3(frequencies: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / factor + blend * frequencies


def _longrope(frequencies: np.ndarray, scaling: Mapping[str, Any], hf: Mapping[str, Any], max_position: int) -> Rope:
    """Phi-3's LongRoPE (Ding et al., 2024): per-pair factors, one set up to the first training length, one past it."""
    original = scaling.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings")
    original = original or max_position
    factor = scaling.get("factor") or max_position / original
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    short = tuple(frequencies / np.asarray(scaling["short_factor"]))
    long = tuple(frequencies / np.asarray(scaling["long_factor"]))
    return Rope(short, long, original, attention_factor)

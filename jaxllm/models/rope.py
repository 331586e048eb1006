"""Rotary position embeddings (Su et al., 2021) in Hugging Face's half-rotated order, with their context scalings."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import UnsupportedModelError

Frequencies = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of one rotary embedding.

    Attributes:
      inverse_frequencies: radians a token for each rotated pair; 2 * len(...) leading dims of a head are rotated.
      scale: what cosines and sines are multiplied by (longrope and yarn's attention factor).
      long_inverse_frequencies: longrope's for sequences past `original_max_position` tokens, or None.
      original_max_position: how many tokens the model was first trained on; only longrope looks at it.
      is_long: the long ones are in effect.
    """

    inverse_frequencies: Frequencies
    scale: float = 1.0
    long_inverse_frequencies: Frequencies | None = None
    original_max_position: int = 0
    is_long: bool = False

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], head_dim: int, max_position: int) -> "Rope":
        """Reads one rotary embedding's parameters as transformers 5 writes them: rope_type, rope_theta, factor, ….

        Frequencies are computed in float32, as transformers does, so that far positions get the same angles.

        Raises:
          UnsupportedModelError: a rope_type that is not in `_SCALINGS`, or one of its parameters is missing.
        """
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if not isinstance(kind, str) or kind not in _SCALINGS:
            raise UnsupportedModelError(f"rope_type={kind!r} is not supported; supported are {', '.join(_SCALINGS)}")
        theta = _number(parameters, "rope_theta", 10000.0)
        rotated = int(head_dim * _number(parameters, "partial_rotary_factor", 1.0))
        if not 0 < rotated <= head_dim or rotated % 2:
            raise UnsupportedModelError(
                f"partial_rotary_factor={parameters.get('partial_rotary_factor')!r} rotates {rotated} of head_dim="
                f"{head_dim} dims; the number must be even and positive"
            )
        exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
        return _SCALINGS[kind](np.float32(1) / np.float32(theta) ** exponents, parameters, max_position)

    def for_length(self, max_length: int) -> "Rope":
        """The same where sequences have no more than `max_length` tokens.

        LongRoPE has two sets of frequencies, for sequences up to `original_max_position` and for longer ones. Keys in
        the cache are rotated already and may be shared, so one set serves all: the long one if a sequence may need it.
        """
        return dataclasses.replace(self, is_long=max_length > self.original_max_position)

    def tables(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines, float32[T, rotated / 2] each, of int32[T] positions."""
        frequencies = self.inverse_frequencies
        if self.is_long and self.long_inverse_frequencies is not None:
            frequencies = self.long_inverse_frequencies
        angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
        return jnp.cos(angles) * self.scale, jnp.sin(angles) * self.scale


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the leading 2 * R dims of each head: x is [T, heads, head_dim], the tables [T, R]; in float32."""
    cos, sin = (table[:, None, :] for table in tables)
    half = cos.shape[-1]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x.dtype) for part in rotated] + [x[..., 2 * half :]], axis=-1)


def rotate_leading(x: jax.Array, tables: tuple[jax.Array, jax.Array], heads: int) -> jax.Array:
    """`rotate` for the first `heads` heads of x [T, all heads, head_dim], which it rotates whole; the others pass.

    The same values, as one elementwise operation: XLA makes one kernel of it on GPUs, where `rotate` makes one for each
    concatenation. On CPU it is 2.4 times slower.
    """
    cos, sin = (table[:, None, None, :] for table in tables)
    halves = x.reshape(*x.shape[:2], 2, -1)
    wide, sign = halves.astype(jnp.float32), jnp.array([-1.0, 1.0])[:, None]
    rotated = (wide * cos + wide[:, :, ::-1] * (sin * sign)).astype(x.dtype)
    head = jax.lax.broadcasted_iota(jnp.int32, halves.shape, 1)
    return jnp.where(head < heads, rotated, halves).reshape(x.shape)


def _number(parameters: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = parameters.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UnsupportedModelError(f"rope parameter {name}={value!r}: must be a positive number")
    return value


def _frequencies(values: np.ndarray) -> Frequencies:
    return tuple(float(value) for value in values.astype(np.float32))


def _default(plain: np.ndarray, parameters: Mapping[str, Any], max_position: int) -> Rope:
    return Rope(_frequencies(plain))


def _linear(plain: np.ndarray, parameters: Mapping[str, Any], max_position: int) -> Rope:
    """Position interpolation (Chen et al., 2023)."""
    return Rope(_frequencies(plain / np.float32(_number(parameters, "factor"))))


def _llama3(plain: np.ndarray, parameters: Mapping[str, Any], max_position: int) -> Rope:
    """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept, those between blended."""
    factor, low, high = (_number(parameters, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _number(parameters, "original_max_position_embeddings", max_position)
    wavelengths = np.float32(2 * math.pi) / plain
    blend = np.clip((np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    return Rope(_frequencies((1 - blend) * plain / np.float32(factor) + blend * plain))


def _yarn(plain: np.ndarray, parameters: Mapping[str, Any], max_position: int) -> Rope:
    """YaRN (Peng et al., 2023): pairs that turn often are kept, those that turn seldom divided by `factor`."""
    original = _number(parameters, "original_max_position_embeddings", max_position)
    factor = _number(parameters, "factor", max_position / original)

    def attention(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    scale = attention(1.0)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        scale = attention(_number(parameters, "mscale")) / attention(_number(parameters, "mscale_all_dim"))

    pairs, theta = len(plain), _number(parameters, "rope_theta", 10000.0)

    def pair(turns: float) -> float:
        """Which pair turns so often within the original length."""
        return pairs * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair(_number(parameters, "beta_fast", 32)), pair(_number(parameters, "beta_slow", 1))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    ramp = np.clip((np.arange(pairs, dtype=np.float32) - first) / ((last - first) or 0.001), 0.0, 1.0)
    return Rope(
        _frequencies(plain / np.float32(factor) * ramp + plain * (1 - ramp)),
        _number(parameters, "attention_factor", scale),
    )


def _longrope(plain: np.ndarray, parameters: Mapping[str, Any], max_position: int) -> Rope:
    """LongRoPE (Ding et al., 2024) as in Phi-3: a factor for each pair, in two sets."""
    original = int(_number(parameters, "original_max_position_embeddings", max_position))
    if original < 2:
        raise UnsupportedModelError(f"rope parameter original_max_position_embeddings={original}: must be at least 2")
    factor = _number(parameters, "factor", max_position / original)
    scale = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    sets = []
    for name in ("short_factor", "long_factor"):
        factors: Any = parameters.get(name)
        is_list = isinstance(factors, list | tuple) and len(factors) == len(plain)
        if not is_list or not all(type(factor) in (int, float) and factor > 0 for factor in factors):
            raise UnsupportedModelError(
                f"rope parameter {name}={factors!r}: must list {len(plain)} positive numbers, one for "
                "each pair of dims that partial_rotary_factor leaves rotated"
            )
        sets.append(_frequencies(plain / np.asarray(factors, np.float32)))
    scale = _number(parameters, "attention_factor", scale)
    return Rope(sets[0], scale, sets[1], original, is_long=max_position > original)


_SCALINGS: dict[str, Callable[[np.ndarray, Mapping[str, Any], int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}

"""Rope scaling of GGUF files as config.json's `rope_scaling`."""

import math
from typing import Any

import numpy as np

from jaxllm.checkpoint.gguf_fields import Fields
from jaxllm.checkpoint.gguf_format import GgufFile
from jaxllm.errors import CheckpointError, UnsupportedModelError


def _factors(file: GgufFile, name: str) -> np.ndarray | None:
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.type_name != "F32" or len(tensor.shape) != 1:
        raise CheckpointError(f"{file.path}: tensor {name!r} is no float32 vector")
    factors = file.raw(tensor).view("<f4").astype(np.float64)
    if not np.all(np.isfinite(factors) & (factors > 0)):
        raise CheckpointError(f"{file.path}: tensor {name!r} holds factors that are not positive")
    return factors


def llama3_factors(dim: int, theta: float, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """What llama3 scaling divides each of the dim/2 rotary frequencies by; float64 [dim/2]."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _fit_llama3(factors: np.ndarray, dim: int, theta: float) -> dict[str, Any] | None:
    """The llama3 parameters that give these factors, or None.

    Files keep only the factors. Between the two wavelengths, 1/factor is linear in 1/wavelength, which determines
    original/(high - low) and low/(high - low); only those ratios matter, so low = 1 loses nothing. The values that
    Meta published are tried first, so that the config reads as the original one does.
    """
    factor = float(factors.max())
    candidates = [(1.0, 4.0, 8192.0)]
    middle = (factors > 1.0001) & (factors < factor * 0.9999)
    if factor > 1 and middle.sum() >= 2:
        inverse = 1 / (2 * math.pi * theta ** (np.arange(0, dim, 2)[middle] / dim))
        smooth = (1 / factors[middle] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(inverse, smooth, 1)
        if intercept < 0 < slope:
            span = -1 / intercept
            candidates.append((1.0, float(1 + span), float(slope * span)))
    for low, high, original in candidates:
        if np.allclose(llama3_factors(dim, theta, factor, low, high, original), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(original) if original.is_integer() else original,
            }
    return None


def rope_scaling(file: GgufFile, fields: Fields, head_dim: int) -> dict[str, Any] | None:
    """The `rope_scaling` entry: llama3 (recovered from the stored factors), longrope, linear, yarn or None.

    Raises:
      CheckpointError: stored factors are malformed.
      UnsupportedModelError: the factors follow no known rule, or the file names another type.
    """
    short, long = _factors(file, "rope_factors_short.weight"), _factors(file, "rope_factors_long.weight")
    if short is not None and long is not None:
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "short_factor": short.tolist(),
            "long_factor": long.tolist(),
        }
        if attention := fields.number("rope.scaling.attn_factor"):
            scaling["attention_factor"] = attention
        return scaling
    factors = _factors(file, "rope_freqs.weight")
    if factors is not None and not np.allclose(factors, 1):
        dim, theta = fields.integer("rope.dimension_count", head_dim), fields.positive("rope.freq_base", 10000.0)
        fitted = _fit_llama3(factors, dim, theta) if len(factors) == dim // 2 else None
        if fitted is None:
            raise UnsupportedModelError(f"{file.path}: rope_freqs.weight follows no rule that jaxllm knows (llama3)")
        return fitted
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"{file.path}: rope.scaling.type={kind!r}; jaxllm reads linear and yarn")
    result: dict[str, Any] = {"rope_type": kind, "factor": fields.positive("rope.scaling.factor")}
    if original := fields.number("rope.scaling.original_context_length"):
        result["original_max_position_embeddings"] = original
    return result

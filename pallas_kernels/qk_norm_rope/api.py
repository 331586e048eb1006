"""The signature of norm and rotation of queries and keys, and the choice of a backend."""

import importlib

import jax

from .types import Heads

BACKENDS = ("reference", "gpu", "tpu")


def has_kernel(
    qkv: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    heads: Heads,
    backend: str,
    *,
    is_normed: bool,
    of_decodes: bool = False,
) -> bool:
    """Whether `backend` has a kernel that gains something for these shapes, with norms or without; "reference" takes
    all. of_decodes: qkv has a row for each of a step's requests."""
    if backend == "gpu":
        from . import gpu  # Pallas takes time to import

        return (is_normed or len(qkv) >= gpu.MIN_TOKENS) and gpu.supports(qkv, tables, heads)
    if backend == "tpu":
        from . import tpu

        return not (of_decodes and tpu.keeps_decodes()) and tpu.supports(qkv, tables, heads)
    return backend == "reference"


def qk_norm_rope(
    qkv: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    weights: tuple[jax.Array, jax.Array] | None,
    heads: Heads,
    *,
    backend: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes queries and keys by head, as Qwen3 does, and rotates them (Su et al., 2021) in Hugging Face's
    half-rotated order. Both in float32, rounded to qkv's dtype after either.

    Args:
      qkv: [T, heads.width].
      tables: cosines and sines, float32[T, R] each; 2 R leading dims of a head are rotated.
      weights: [dim] of the queries' norm and of the keys'; None: there are no norms.
      backend: one of BACKENDS.

    Returns:
      queries [T, heads.queries, dim], keys and values [T, heads.keys, dim], in qkv's dtype.

    Raises:
      ValueError: shapes that do not fit, or what the backend lacks.
    """
    if qkv.ndim != 2 or qkv.shape[1] != heads.width or any(len(each) != len(qkv) for each in tables):
        raise ValueError(f"qkv {qkv.shape} must be [T, {heads.width}], and tables {tables[0].shape} [T, R]")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; the backends are {', '.join(BACKENDS)}")
    module = importlib.import_module(f".{backend}", __package__)
    return module.qk_norm_rope(qkv, tables, weights, heads)

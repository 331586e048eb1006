"""The one signature of ragged paged attention, its checks, and the choice of a backend."""

import importlib
from types import ModuleType

import jax

from .types import AttentionMetadata, CacheSpec

BACKENDS = ("reference", "xla", "gpu", "tpu")


def _module(backend: str) -> ModuleType:
    """The backend's file, imported when first asked for: Pallas takes time to import."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; the backends are {', '.join(BACKENDS)}")
    return importlib.import_module(f".{backend}", __package__)


def cache_shape(spec: CacheSpec, backend: str) -> jax.ShapeDtypeStruct:
    """The shape and dtype of one layer's cache under `backend`. Raises ValueError for what the backend lacks."""
    return _module(backend).cache_shape(spec)


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    metadata: AttentionMetadata,
    *,
    backend: str,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    then: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes this step's keys and values into their pages, then lets every query token attend to its sequence so far.

    Args:
      q: [T, num_heads, head_dim], the query tokens of all rows, one row after another, padded at the end.
      k, v: [T, num_kv_heads, head_dim], the new keys and values; num_heads is a multiple of num_kv_heads.
      cache: one layer's pages, in the layout of `cache_shape`; donate it, it is updated in place. Of a page that gets
        new keys and values, what lies behind the row's end may change, too: it is to be written before it is seen.
      metadata: where each token stands. Foreign pages and the dummy page may hold anything, NaN included.
      backend: one of BACKENDS.
      scale: what query-key products are multiplied by.
      window: a token sees itself and the `window - 1` before it. None: all before it.
      cap: scores become `cap * tanh(score / cap)` (Gemma 2).
      sinks: float[num_heads], a logit a head that takes part in the softmax and has no value (gpt-oss).
      k_scale, v_scale: float32 scalars; the cache holds `k / k_scale` and `v / v_scale` in its own dtype.
      then: the weight [K, N] of the product that follows; a backend may bring a part of it nearer meanwhile.

    Returns:
      (out, cache): out is [T, num_heads, head_dim] in q's dtype, zero for padding tokens.

    Raises:
      ValueError: shapes that do not fit each other, or a feature that the backend lacks.
    """
    if q.ndim != 3 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} must be [T, heads, head_dim] of one T and head_dim")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key-value heads")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    if metadata.decodes_only and metadata.kv_lens.shape[0] != q.shape[0]:
        raise ValueError(f"decodes_only wants as many tokens as rows, not {q.shape[0]} and {metadata.kv_lens.shape[0]}")
    options = dict(scale=scale, window=window, cap=cap, sinks=sinks, k_scale=k_scale, v_scale=v_scale)
    ahead = {"then": then} if backend == "gpu" else {}
    return _module(backend).ragged_paged_attention(q, k, v, cache, metadata, **options, **ahead)

"""Ragged paged attention in float32, written to be read: the truth that every backend is tested against."""

import jax
import jax.numpy as jnp

from .types import AttentionMetadata, CacheSpec


def cache_shape(spec: CacheSpec) -> jax.ShapeDtypeStruct:
    """[num_pages, 2 (key, value), num_kv_heads, page_size, head_dim]."""
    shape = (spec.num_pages, 2, spec.num_kv_heads, spec.page_size, spec.head_dim)
    return jax.ShapeDtypeStruct(shape, spec.dtype)


def write(cache: jax.Array, k: jax.Array, v: jax.Array, metadata: AttentionMetadata) -> jax.Array:
    """Puts the new keys and values, [T, num_kv_heads, head_dim] each, into their pages."""
    page_size = cache.shape[3]
    page, offset = metadata.write_slots // page_size, metadata.write_slots % page_size
    new = jnp.stack([k, v], axis=1).astype(cache.dtype)
    return cache.at[page, :, :, offset].set(new)


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.ragged_paged_attention`. Gathers every row's whole page table: cost and memory are T * P * page_size."""
    if k_scale is not None:
        k = k / k_scale
    if v_scale is not None:
        v = v / v_scale
    cache = write(cache, k, v, metadata)
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = cache.shape[2]

    # [S, P, 2, K, page_size, D] -> [S, P * page_size, 2, K, D]; pages never written hold anything, NaN too.
    pages = cache[metadata.page_tables].astype(jnp.float32)
    history = jnp.moveaxis(pages, 4, 2).reshape(pages.shape[0], -1, 2, num_kv_heads, head_dim)
    history = history[metadata.row_ids]  # [T, C, 2, K, D]
    key_positions = jnp.arange(history.shape[1])
    visible = key_positions <= metadata.positions[:, None]
    visible &= key_positions < metadata.kv_lens[metadata.row_ids][:, None]
    if window is not None:
        visible &= key_positions > metadata.positions[:, None] - window
    history = jnp.where(visible[:, :, None, None, None], history, 0.0)
    keys, values = history[:, :, 0], history[:, :, 1]
    if k_scale is not None:
        keys = keys * k_scale
    if v_scale is not None:
        values = values * v_scale

    queries = q.astype(jnp.float32).reshape(tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("TKGD,TCKD->TKGC", queries, keys, precision="highest") * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(visible[:, None, None, :], scores, -jnp.inf)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:  # one learned logit a query head that takes probability and gives nothing
        sinks = sinks.astype(jnp.float32).reshape(num_kv_heads, -1)[None, :, :, None]
        highest = jnp.maximum(highest, sinks)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - highest)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum("TKGC,TCKD->TKGD", weights, values, precision="highest")
    out = out.reshape(tokens, num_heads, head_dim).astype(q.dtype)
    padding = jnp.arange(tokens) >= metadata.query_starts[metadata.num_rows]
    return jnp.where(padding[:, None, None], 0, out), cache

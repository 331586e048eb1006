"""Norm and rotation of queries and keys in plain JAX: the truth."""

import jax
import jax.numpy as jnp

from ..add_rms_norm import rms_norm
from .types import Heads


def qk_norm_rope(
    qkv: jax.Array, tables: tuple[jax.Array, jax.Array], weights: tuple[jax.Array, jax.Array] | None, heads: Heads
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.qk_norm_rope`."""
    all_heads = qkv.reshape(len(qkv), -1, heads.dim)
    q, k, v = jnp.split(all_heads, (heads.queries, heads.queries + heads.keys), axis=1)
    if weights is not None:
        q, k = (rms_norm(x, w, eps=heads.eps, unit_offset=heads.unit_offset) for x, w in zip((q, k), weights))
    return _rotate(q, tables), _rotate(k, tables), v


def _rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = (table[:, None, :] for table in tables)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=2)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=2).astype(x.dtype)

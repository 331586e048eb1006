"""Norm and rotation of a fused projection's queries and keys in plain JAX: the truth."""

import jax
import jax.numpy as jnp

from ..add_rms_norm import rms_norm
from .types import Heads


def qk_norm_rope(
    qkv: jax.Array, tables: tuple[jax.Array, jax.Array], weights: tuple[jax.Array, jax.Array] | None, heads: Heads
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.qk_norm_rope`."""
    cos, sin = (table[:, None] for table in tables)
    half = cos.shape[2]

    def rotated(x: jax.Array) -> jax.Array:
        first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
        turned = first * cos - second * sin, second * cos + first * sin
        return jnp.concatenate([*(part.astype(x.dtype) for part in turned), x[..., 2 * half :]], axis=2)

    joined = qkv.reshape(len(qkv), -1, heads.dim)
    q, k, v = jnp.split(joined, (heads.queries, heads.queries + heads.keys), axis=1)
    if weights is not None:
        q, k = (
            rms_norm(x, weight, eps=heads.eps, unit_offset=heads.unit_offset)
            for x, weight in zip((q, k), weights, strict=True)
        )
    return rotated(q), rotated(k), v

"""Norm and rotation of a fused projection's queries and keys in plain JAX: the truth."""

import jax
import jax.numpy as jnp

from ..rotate_heads.reference import rotate_heads
from .types import Heads


def qk_norm_rope(
    qkv: jax.Array, tables: tuple[jax.Array, jax.Array], weights: tuple[jax.Array, jax.Array] | None, heads: Heads
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.qk_norm_rope`."""
    joined = rotate_heads(
        qkv.reshape(len(qkv), -1, heads.dim),
        *tables,
        queries=heads.queries,
        keys=heads.keys,
        norms=weights,
        eps=heads.eps,
        unit_offset=heads.unit_offset,
    )
    q, k, v = jnp.split(joined, (heads.queries, heads.queries + heads.keys), axis=1)
    return q, k, v

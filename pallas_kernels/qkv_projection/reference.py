"""Projection, norm and rotation in plain JAX: the truth, and what runs where there is no kernel."""

import jax
import jax.numpy as jnp

from ..qk_norm_rope import Heads, reference


def qkv_projection(
    x: jax.Array,
    weight: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    norms: tuple[jax.Array, jax.Array] | None,
    heads: Heads,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.qkv_projection`."""
    return reference.qk_norm_rope(jnp.dot(x, weight), tables, norms, heads)

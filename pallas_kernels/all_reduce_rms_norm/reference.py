"""The sum over shards and the norm of the sum in plain JAX: the truth."""

import jax
import jax.numpy as jnp
from jax import lax

from ..add_rms_norm import rms_norm


def all_reduce_rms_norm(
    x: jax.Array, update: jax.Array, weight: jax.Array, *, axis: str, eps: float, unit_offset: bool
) -> tuple[jax.Array, jax.Array]:
    """See `api.all_reduce_rms_norm`."""
    rows, own = update.shape[0], x.shape[0]
    total = lax.psum(update.astype(jnp.float32), axis)
    total = jnp.pad(total, ((0, own * lax.axis_size(axis) - rows), (0, 0)))
    mine = lax.dynamic_slice_in_dim(total, lax.axis_index(axis) * own, own)
    x = (x.astype(jnp.float32) + mine).astype(x.dtype)
    normed = rms_norm(x, weight, eps=eps, unit_offset=unit_offset)
    return x, lax.all_gather(normed, axis, tiled=True)[:rows]

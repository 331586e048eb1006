"""What rotated heads are, in plain JAX."""

import jax
import jax.numpy as jnp

from ..add_rms_norm import rms_norm


def rotate_heads(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    queries: int,
    keys: int,
    norms: tuple[jax.Array, jax.Array] | None,
    eps: float,
    unit_offset: bool,
) -> jax.Array:
    """See `api.rotate_heads`. Norms are rounded to x's dtype before the rotation, which is in float32."""
    parts = [x[:, :queries], x[:, queries : queries + keys]]
    if norms is not None:
        parts = [rms_norm(part, weight, eps=eps, unit_offset=unit_offset) for part, weight in zip(parts, norms)]
    half = cos.shape[1]
    turned = jnp.concatenate(parts, axis=1)
    first, second = turned[..., :half].astype(jnp.float32), turned[..., half : 2 * half].astype(jnp.float32)
    cos, sin = cos[:, None], sin[:, None]
    rotated = [(first * cos - second * sin).astype(x.dtype), (second * cos + first * sin).astype(x.dtype)]
    turned = jnp.concatenate([*rotated, turned[..., 2 * half :]], axis=2)
    return jnp.concatenate([turned, x[:, queries + keys :]], axis=1)

"""The residual sum and its norm in plain JAX: the truth, and what runs where there is no kernel."""

import jax
import jax.numpy as jnp


def add_rms_norm(
    x: jax.Array, update: jax.Array, weight: jax.Array, *, eps: float, unit_offset: bool
) -> tuple[jax.Array, jax.Array]:
    """See `api.add_rms_norm`."""
    if update.ndim == 3:
        x = (x.astype(jnp.float32) + update.sum(0)).astype(x.dtype)
    else:
        x = x + update
    return x, rms_norm(x, weight, eps=eps, unit_offset=unit_offset)


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, unit_offset: bool) -> jax.Array:
    """The norm over the last axis alone."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if unit_offset:
        return (wide * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return wide.astype(x.dtype) * weight

"""The projection to a row's largest entry in plain JAX: the truth."""

import jax
import jax.numpy as jnp
from jax import lax


def argmax_projection(
    x: jax.Array, weight: jax.Array, num_valid: jax.Array | int, *, by_columns: bool, cap: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `api.argmax_projection`."""
    wanted = (((1,), (1 if by_columns else 0,)), ((), ()))
    entries = lax.dot_general(x, weight, wanted, preferred_element_type=jnp.float32)
    if cap is not None:
        entries = cap * jnp.tanh(entries / cap)
    entries = jnp.where(entries < jnp.inf, entries, jnp.inf)  # NaN too
    entries = jnp.where(lax.broadcasted_iota(jnp.int32, entries.shape, 1) < num_valid, entries, -jnp.inf)
    return jnp.max(entries, axis=1), jnp.argmax(entries, axis=1).astype(jnp.int32)

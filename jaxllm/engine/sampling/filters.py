"""Top-k, top-p and min-p without a sort: thresholds found by bisection."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding import num_shards, sum_over

_INFINITY = np.int32(0x7F800000)  # the bits of float32 infinity
_MASS_BITS = 30


def _bisect(
    key: jax.Array,
    weight: jax.Array | None,
    target: jax.Array,
    low: jax.Array,
    high: jax.Array,
    axis: str | None,
) -> jax.Array:
    """The smallest threshold t in [low, high] whose tokens {key <= t} weigh at least `target`; `high` must reach it.

    At most 31 rounds of one masked sum each; a vocabulary in shards adds up one int32[R] a round. Where tokens are only
    counted, a row is done as soon as a threshold parts exactly `target` of them.

    Args:
      key: int32[R, V], not negative.
      weight: int32[R, V], or None to count tokens.
      target, low, high: int32[R], the same on all shards. Rows with low == high are done already.
      axis: the mesh axis of a vocabulary in shards.
    """

    def unfinished(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        low, high = bounds
        return jnp.any(low < high)

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        within = key <= middle[:, None]
        total = jnp.sum(within.astype(jnp.int32) if weight is None else jnp.where(within, weight, 0), axis=1)
        total = sum_over(total, axis)
        enough = total >= target
        above = jnp.where(enough, low, middle + 1)
        if weight is None:
            above = jnp.where(total == target, middle, above)
        open_row = low < high
        return jnp.where(open_row, above, low), jnp.where(open_row & enough, middle, high)

    return lax.while_loop(unfinished, halve, (low, high))[1]


def _integer_masses(distance: jax.Array, kept: jax.Array, ids: jax.Array, axis: str | None) -> jax.Array:
    """Probabilities in fixed point: int32[R, V] whose rows sum to at most about 2**30, all shards together.

    Integers add up to the same sum in any order, so that a threshold depends on neither batch, padding nor sharding.
    The scale is a power of two for the same reason: the float sum of which it is taken may differ in its last bit.
    Rounding is up or down by a low-discrepancy sequence over the ids (multiples of the golden ratio), so that the
    errors of many faint tokens cancel instead of adding up.
    """
    mass = jnp.where(kept, jnp.exp(-distance), 0)
    _, exponent = jnp.frexp(sum_over(jnp.sum(mass, axis=1, keepdims=True), axis))
    dither = ((ids.astype(jnp.uint32) * np.uint32(0x9E3779B9)) >> 8).astype(jnp.float32) * np.float32(2**-24)
    return (mass * jnp.exp2((_MASS_BITS - exponent).astype(jnp.float32)) + dither).astype(jnp.int32)


def kept_tokens(
    distance: jax.Array,
    ids: jax.Array,
    active: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    axis: str | None = None,
) -> jax.Array:
    """Which tokens min_p, top_k and top_p leave, in that order, each on what the one before left (as in vLLM).

    top_k keeps the k nearest tokens, top_p the smallest nearest set that reaches top_p of the mass left so far. All
    tokens that tie with the last one kept (equal distances) are kept too: the order of token ids plays no part.
    Masses are exact to about 10**-7, as good as float32 probabilities are.

    Args:
      distance: float32[R, V], (largest logit - logit) / temperature: at least 0, infinity for forbidden tokens.
      ids: int32[V], the columns' global ids.
      active: bool[R]; other rows keep everything.
      top_k: int32[R]; below 1 or from V (of all shards) on: disabled.
      top_p: float32[R]; from 1 on: disabled.
      min_p: float32[R]; 0: disabled.
      axis: the mesh axis of a vocabulary in shards, each of which holds V columns.

    Returns:
      bool[R, V].
    """
    # Floats that are not negative are ordered as their bits are, and bits can be bisected exactly.
    key = lax.bitcast_convert_type(distance, jnp.int32)
    zero = jnp.zeros_like(top_k)
    reach = jnp.where(active & (min_p > 0), jnp.abs(jnp.log(min_p)), jnp.inf)
    threshold = lax.bitcast_convert_type(reach, jnp.int32)

    by_count = active & (top_k > 0) & (top_k < distance.shape[1] * num_shards(axis))
    low, high = jnp.where(by_count, zero, _INFINITY), jnp.full_like(top_k, _INFINITY)
    nearest = _bisect(key, None, top_k, low, high, axis)
    threshold = jnp.minimum(threshold, nearest)

    by_mass = active & (top_p < 1)

    def nucleus(threshold: jax.Array) -> jax.Array:
        mass = _integer_masses(distance, key <= threshold[:, None], ids, axis)
        total = sum_over(jnp.sum(mass, axis=1), axis)
        target = jnp.ceil(total.astype(jnp.float32) * top_p).astype(jnp.int32)
        target = jnp.clip(target, 1, jnp.maximum(total, 1))
        return _bisect(key, mass, target, jnp.where(by_mass, zero, threshold), threshold, axis)

    threshold = lax.cond(jnp.any(by_mass), nucleus, lambda threshold: threshold, threshold)
    return key <= threshold[:, None]

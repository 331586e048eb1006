"""What the TPU kernels share."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from .tpu_sizes import LANES

LOWEST = -1e30  # stands for minus infinity; LOWEST - LOWEST is a number
LOG2E = 1.4426950408889634


def cdiv(a, b):
    """a / b, rounded up, for scalars that are not negative."""
    return lax.div(a + (b - 1), b)


def dot_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32[m, n] of a [m, k] and b [n, k]; exact products for float32 operands."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=_precision(a), preferred_element_type=jnp.float32)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32[m, n] of a [m, k] and b [k, n]."""
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=_precision(a), preferred_element_type=jnp.float32)


def _precision(x: jax.Array):
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def to_log2(scores: jax.Array, scale: jax.Array, cap: float | None) -> jax.Array:
    """Raw products to logits in units of log 2, so that `exp2` is all that softmax needs."""
    if cap is None:
        return scores * (scale * LOG2E)
    return jnp.tanh(scores * (scale * (1.0 / cap))) * (cap * LOG2E)


def keep_in_hbm(cache: jax.Array, interpret) -> jax.Array:
    """Without this, XLA copies a cache that VMEM can hold there before a kernel, and back."""
    return cache if interpret else pltpu.with_memory_space_constraint(cache, pltpu.HBM)


def widen(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] of which all lanes are equal to [rows, width], without moving anything between lanes."""
    return x[:, :width] if width <= LANES else jnp.concatenate([x] * (width // LANES), axis=1)


def fold(x: jax.Array) -> jax.Array:
    """[rows, width] to [rows, LANES] that have the same sum."""
    if x.shape[1] < LANES:  # the first lane takes all
        first = lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1) == 0
        return jnp.where(first, jnp.sum(x, axis=1, keepdims=True), 0.0)
    parts = [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]
    return functools.reduce(jnp.add, parts)

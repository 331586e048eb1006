"""The collectives of a step, by name. `axis` is a mesh axis inside `shard_map`, or None: there is one shard, and
nothing is done."""

import jax
from jax import lax


def sum_over(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum of all shards' x, on each of them."""
    return x if axis is None else lax.psum(x, axis)


def max_over(x: jax.Array, axis: str | None) -> jax.Array:
    """The largest of all shards' x, elementwise, on each of them."""
    return x if axis is None else lax.pmax(x, axis)


def gather_over(x: jax.Array, axis: str) -> jax.Array:
    """All shards' x, stacked along a new first axis, on each of them."""
    return lax.all_gather(x, axis)


def shard_start(width: int, axis: str | None) -> jax.Array | int:
    """Where this shard's part begins on an axis that is cut into parts of `width`."""
    return 0 if axis is None else lax.axis_index(axis) * width


def num_shards(axis: str | None) -> int:
    """How many there are."""
    return 1 if axis is None else lax.axis_size(axis)

"""Arrays on a mesh made of parts, so that a host holds only what its devices own."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Sharding

Index = tuple[slice, ...]


def from_parts(shape: Sequence[int], sharding: Sharding, make: Callable[[Index, jax.Device], jax.Array]) -> jax.Array:
    """A global array.

    Args:
      shape: of the whole array.
      sharding: where its parts live.
      make: a part on a device, from its place in the array (every slice has a start and a stop); called once for each
        distinct part that this process's devices hold, one after another. Other devices get copies.
    """
    made: dict[tuple[tuple[int, int], ...], jax.Array] = {}
    parts = []
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if bounds not in made:
            made[bounds] = make(tuple(slice(start, stop) for start, stop in bounds), device)
        parts.append(jax.device_put(made[bounds], device))
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, parts)


def place(value: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """A global array of a value that every process has whole: each sends its own devices their parts. Nothing is said
    between processes, unlike `jax.device_put`, which compares their values. None is the default device."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_process_local_data(sharding, value, value.shape)

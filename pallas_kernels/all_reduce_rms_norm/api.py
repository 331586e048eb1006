"""The signature of the sum over shards with the norm behind it, and the choice of a backend."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BACKENDS = ("reference", "gpu")


def has_kernel(width: int, dtype, devices: int, backend: str) -> bool:
    """Whether `backend` takes rows of this width and dtype over so many devices; "reference" takes all."""
    if backend != "gpu":
        return backend == "reference"
    from . import gpu  # Pallas takes time to import

    return gpu.supports(width, dtype, devices)


def all_reduce_rms_norm(
    x: jax.Array,
    update: jax.Array,
    weight: jax.Array,
    *,
    axis: str,
    eps: float,
    unit_offset: bool = False,
    peers: jax.Array | None = None,
    backend: str,
) -> tuple[jax.Array, jax.Array]:
    """Adds the sum of all shards' updates to a residual stream whose rows are dealt out among them, and gives all of
    them the norm of the sum (sequence parallelism, Korthikanti et al., 2022; the norm is Zhang and Sennrich's, 2019).

    For the inside of `shard_map`. Of n shards the i-th owns the rows from i * ceil(T / n); where n does not divide T,
    the last ones own rows that are not there, with anything in them.

    Args:
      x: [ceil(T / n), H], this shard's rows of the stream.
      update: [T, H], this shard's part of the sum.
      weight: [H].
      axis: the mesh axis of the shards. All of them are GPUs of one process with access to each other's memory.
      eps: added to the mean square.
      unit_offset: the weight is stored less one and multiplied before rounding (Gemma); otherwise after.
      peers: what `open_memory` returned for this mesh and width; with it few rows are summed by a kernel that costs the
        host nothing besides, which needs all shards to sum the same numbers of rows in the same order. None: any rows.
      backend: one of BACKENDS.

    Returns:
      (this shard's rows of x + the sum of updates [ceil(T / n), H], the norm of all rows [T, H]), in x's dtype, summed
      in float32; the same bits on all shards.

    Raises:
      ValueError: shapes that do not fit, or what the backend lacks.
    """
    own = -(-update.shape[0] // lax.axis_size(axis))
    if update.ndim != 2 or x.shape != (own, update.shape[1]) or weight.shape != x.shape[1:] or x.dtype != update.dtype:
        raise ValueError(
            f"update {update.shape} {update.dtype.name} must be [T, H], x {x.shape} {x.dtype.name} its {own} rows of a "
            f"shard, and weight {weight.shape} [H]"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; the backends are {', '.join(BACKENDS)}")
    if backend == "gpu" and peers is not None:
        from . import gpu_symmetric

        if update.shape[0] <= gpu_symmetric.MAX_ROWS:
            return gpu_symmetric.all_reduce_rms_norm(
                x, update, weight, peers, axis=axis, eps=eps, unit_offset=unit_offset
            )
    module = importlib.import_module(f".{backend}", __package__)
    return module.all_reduce_rms_norm(x, update, weight, axis=axis, eps=eps, unit_offset=unit_offset)


def open_memory(mesh: Mesh, axis: str, width: int) -> tuple[jax.Array, jax.Array]:
    """Memory of each device of a mesh that the others write to, for sums over `axis`, and where it lies.

    Args:
      mesh: of GPUs of this process, all along `axis`, which reach each other's memory.
      width: of the rows.

    Returns:
      (the memory, zeros, to be kept as long as anything uses the addresses; addresses int32[n * (n + 1), 2], of which
      each device has the part [n + 1, 2] that `all_reduce_rms_norm` takes as `peers`).
    """
    from . import gpu_symmetric

    devices = list(mesh.devices.flat)
    place = NamedSharding(mesh, PartitionSpec(axis))
    size = gpu_symmetric.memory_size(width, len(devices))
    make = jax.jit(lambda: jnp.zeros(len(devices) * size, jnp.uint8), out_shardings=place)
    memory = jax.block_until_ready(make())
    at = {shard.device: shard.data.unsafe_buffer_pointer() for shard in memory.addressable_shards}
    addresses = np.array([at[device] for device in devices], np.uint64).view(np.int32).reshape(-1, 2)
    rows = [row for here in range(len(devices)) for row in (*addresses, np.array([here, 0], np.int32))]
    return memory, jax.device_put(np.stack(rows), place)

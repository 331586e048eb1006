"""Fills a model from what `jaxllm convert` wrote: Orbax restores each stored slice right onto the mesh, and each device
joins the pieces of its fused projections.

How a shard's piece is found: along the axis that is dealt out, a slice is padded so that all shards' pieces are equal,
which is how `Source.piece` cuts it. Of a slice that several neighbouring shards hold copies of, the mesh's tensor axis
is split in two, and the slice is dealt out along the first.
"""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from jaxllm.checkpoint.orbax_source import OrbaxCheckpoint
from jaxllm.errors import CheckpointError
from jaxllm.models.loader import OnProgress, Shardings, check, parameters_of
from jaxllm.models.sources import Parts, Source
from sharding import TENSOR

_GROUP_BYTES = 1 << 30  # so much is restored by one call to Orbax, and the next follows meanwhile
_COPY = "copy"


@dataclasses.dataclass(frozen=True)
class Target:
    """A parameter that is to be filled.

    Attributes:
      shapes: of each stored array, as it is stored.
      global_shapes: the same, padded for the shards.
    """

    parameter: nnx.Param
    parts: Parts
    names: list[str]
    shapes: list[tuple[int, ...]]
    global_shapes: list[tuple[int, ...]]
    shardings: list[Sharding]
    sharding: Sharding


def restore(
    model: nnx.Module,
    checkpoint: OrbaxCheckpoint,
    *,
    dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Fills the parameters; see `loader.load`. While arrays are restored, other threads compare the checksums of this
    host's share of the files.

    Raises:
      CheckpointError: arrays are missing, extra or misshapen (all are named), or a file is altered (it is named).
      UnsupportedModelError: orbax-checkpoint is not installed.
    """
    checkpointer = make_checkpointer()
    targets = [_target(path, parameter, shardings) for path, parameter in parameters_of(model)]
    expected = {index: list(zip(t.names, t.shapes, strict=True)) for index, t in enumerate(targets)}
    check(expected, checkpoint, tied=getattr(model, "lm_head", True) is None)
    total, done, lock = sum(array.num_bytes for array in checkpoint.arrays.values()), 0, threading.Lock()

    def fill(group: Sequence[Target]) -> None:
        nonlocal done
        restored = _restore_arrays(checkpointer, checkpoint, group, dtype)
        for target in group:
            target.parameter.set_value(_join(target, [restored.pop(name) for name in target.names]))
        with lock:
            done += sum(checkpoint.num_bytes(name) for target in group for name in target.names)
            if on_progress is not None:
                on_progress(done, total)

    share = dict(share=jax.process_index(), shares=jax.process_count())
    with concurrent.futures.ThreadPoolExecutor(3, "restore") as pool:
        verified = pool.submit(checkpoint.verify, **share)
        filled = [pool.submit(fill, group) for group in _groups(targets, checkpoint)]
        try:
            for future in concurrent.futures.as_completed([verified, *filled]):
                future.result()
        except BaseException as error:
            for future in filled:
                future.cancel()
            if isinstance(error, CheckpointError) or not isinstance(error, Exception):
                raise
            verified.result()  # which knows the file, if one is at fault
            raise CheckpointError(f"{checkpoint.weights}: cannot be restored: {error}") from error


def make_checkpointer() -> Any:
    """Orbax's reader and writer of the format: plain zarr, a directory an array, without compression. Raises
    UnsupportedModelError."""
    try:
        import orbax.checkpoint as ocp  # here: it takes a second to import
    except ImportError as error:
        from jaxllm.errors import UnsupportedModelError

        raise UnsupportedModelError(f"Orbax checkpoints need the extra orbax: {error}") from error
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,
            use_zarr3=False,
            use_compression=False,
            save_concurrent_gb=2,
            restore_concurrent_gb=4,
            type_handler_registry=handlers,
        )
    )


def stored_shape(source: Source, parts: Parts) -> tuple[int, ...]:
    """The shape under which a source of a parameter is stored."""
    return _turned((source.width, *parts.rest), parts)


def _turned(shape: tuple[int, ...], parts: Parts) -> tuple[int, ...]:
    return shape if parts.joined_axis == 0 else (*shape[1:], shape[0])


def _target(path: tuple, parameter: nnx.Param, shardings: Shardings | None) -> Target:
    parts = Parts(path, parameter)
    if shardings is None:
        assert parts.shards == 1, "a model in shards needs a mesh"
        own: Sharding = SingleDeviceSharding(jax.devices()[0])
    else:
        found = shardings(parameter.get_metadata()["axes"])
        own = SingleDeviceSharding(jax.devices()[0]) if found is None else found
    widths = [source.shard_width(parts.rows) * (parts.rows // source.copies) for source in parts.sources]
    return Target(
        parameter,
        parts,
        parts.stored_names(),
        [stored_shape(source, parts) for source in parts.sources],
        [_turned((width, *parts.rest), parts) for width in widths],
        [_with_copies(own, source.copies) if parts.rows > 1 else own for source in parts.sources],
        own,
    )


def _with_copies(sharding: Sharding, copies: int) -> Sharding:
    """The same where `copies` neighbours along the tensor axis hold one piece."""
    if copies == 1:
        return sharding
    assert isinstance(sharding, NamedSharding)
    mesh = sharding.mesh
    at = mesh.axis_names.index(TENSOR)
    shape = list(mesh.devices.shape)
    shape[at : at + 1] = [shape[at] // copies, copies]
    names = (*mesh.axis_names[: at + 1], _COPY, *mesh.axis_names[at + 1 :])
    types = (*mesh.axis_types[: at + 1], mesh.axis_types[at], *mesh.axis_types[at + 1 :])
    return NamedSharding(Mesh(mesh.devices.reshape(shape), names, axis_types=types), sharding.spec)


def _groups(targets: Sequence[Target], checkpoint: OrbaxCheckpoint) -> Iterator[list[Target]]:
    """Runs of parameters of about _GROUP_BYTES."""
    group: list[Target] = []
    size = 0
    for target in targets:
        group.append(target)
        size += sum(checkpoint.num_bytes(name) for name in target.names)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _restore_arrays(
    checkpointer: Any, checkpoint: OrbaxCheckpoint, group: Sequence[Target], dtype: DTypeLike | None
) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    arguments = {
        name: ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=shape, dtype=np.dtype(dtype or target.parameter.dtype), strict=False
        )
        for target in group
        for name, shape, sharding in zip(target.names, target.global_shapes, target.shardings, strict=True)
    }
    wanted: Mapping[str, int] = dict.fromkeys(arguments, 0)
    what = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
    return dict(checkpointer.restore(checkpoint.weights, args=what))


def _join(target: Target, pieces: list[jax.Array]) -> jax.Array:
    """The parameter: each device puts its own pieces side by side."""
    if len(pieces) == 1:
        return pieces[0]
    by_device = [{shard.device: shard.data for shard in piece.addressable_shards} for piece in pieces]
    joined = [_concatenate([own[device] for own in by_device], target.parts.joined_axis) for device in by_device[0]]
    return jax.make_array_from_single_device_arrays(tuple(target.parameter.shape), target.sharding, joined)


def _concatenate(pieces: list[jax.Array], axis: int) -> jax.Array:
    return _concatenated(tuple(pieces), axis)


@jax.jit(static_argnums=1)
def _concatenated(pieces: tuple[jax.Array, ...], axis: int) -> jax.Array:
    return jnp.concatenate(pieces, axis)

"""Fills a model's abstract parameters: from a checkpoint, tensor by tensor, or with random weights made on the device.

A parameter's metadata says what it is made of (see `layers`). Nothing here knows a family.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.errors import CheckpointError
from jaxllm.models.sources import Parts, Source, TensorSource, origins
from sharding import from_parts, place

# Buffers that older checkpoints carry and that follow from the config.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
_ALIGNMENT = 64  # bytes; the CPU backend takes arrays so aligned as they are, without a copy
_DUMMY_STDDEV = 0.02

# From a parameter's logical axis names to where it lives; None is the default device.
Shardings = Callable[[tuple[str | None, ...]], jax.sharding.Sharding | None]
# Called with the bytes read so far and all of them.
OnProgress = Callable[[int, int], None]


def load(
    model: nnx.Module,
    checkpoint: TensorSource,
    *,
    dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Fills the parameters from a checkpoint.

    Each tensor is read straight into its slice of a buffer of its parameter's shape, so that the host holds no more
    than a few parameters beside the model: one a thread, and none on the CPU backend, which keeps the buffers. Of a
    parameter in shards a buffer holds one, and only those that this host's devices own are read. While one thread's
    buffer goes to its device, the others read.

    Args:
      model: abstract parameters are replaced by device arrays.
      checkpoint: where tensors come from.
      dtype: what parameters become; by default what each declares.
      shardings: where parameters go.
      on_progress: called after each parameter, from this thread; see `progress_bar`.

    Raises:
      CheckpointError: tensors are missing, extra or misshapen (all are named), or a file is truncated or altered.
    """
    parameters = dict(parameters_of(model))
    parts = {path: Parts(path, parameter) for path, parameter in parameters.items()}
    if checkpoint.converted:
        parts = {path: each.converted() for path, each in parts.items()}
    expected = {path: each.tensors() for path, each in parts.items()}
    check(expected, checkpoint, tied=getattr(model, "lm_head", True) is None)
    buffers = _Buffers()

    def fill(path: tuple) -> int:
        array = _read(parts[path], parameters[path], checkpoint, buffers, dtype, shardings)
        array.block_until_ready()  # so that buffers do not pile up behind a slow transfer
        parameters[path].set_value(array)
        return sum(checkpoint.num_bytes(name) for name, _ in expected[path])

    total = sum(checkpoint.num_bytes(name) for tensors in expected.values() for name, _ in tensors)
    done = 0
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1), "load") as pool:
        futures = [pool.submit(fill, path) for path in parameters]
        try:
            for future in concurrent.futures.as_completed(futures):
                done += future.result()
                if on_progress is not None:
                    on_progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def load_dummy(
    model: nnx.Module, *, dtype: DTypeLike | None = None, seed: int = 0, shardings: Shardings | None = None
) -> None:
    """Fills the parameters with normal values of deviation 0.02, or with what their metadata `init` names ("zeros",
    "ones"); all of them are made where they live. The values depend on the seed and the parameters' order alone: a
    model in shards gets those of the whole one.
    """
    for index, (path, parameter) in enumerate(parameters_of(model)):
        metadata = parameter.get_metadata()
        sharding = None if shardings is None else shardings(metadata["axes"])
        parts = Parts(path, parameter)
        make = _dummy(
            parameter.shape,
            jnp.dtype(dtype or parameter.dtype),
            metadata.get("init", "normal"),
            sharding,
            None
            if parts.rows == 1
            else (parts.joined_axis, tuple(dataclasses.replace(s, name="") for s in parts.sources), parts.rows),
        )
        parameter.set_value(make(np.uint32(seed % 2**32), np.uint32(index)))


@contextlib.contextmanager
def progress_bar(description: str = "Loading weights") -> Iterator[OnProgress]:
    """A bar on the terminal, for `on_progress`."""
    from rich import console, progress  # here: only those who look at a terminal pay for the import

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    terminal = console.Console(stderr=True)
    with progress.Progress(*columns, console=terminal, redirect_stdout=False, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def parameters_of(model: nnx.Module) -> Iterator[tuple[tuple, nnx.Param]]:
    """Every parameter once, with its path: ("model", "layers", 0, …)."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param):
            yield path, node


def check(expected: Mapping[Any, Sequence[tuple[str, tuple[int, ...]]]], checkpoint: TensorSource, tied: bool) -> None:
    """Raises CheckpointError with every name that is missing, extra or misshapen. `expected`: of each parameter what it
    is made of; `tied`: the model has no output projection of its own."""
    shapes = {name: shape for sources in expected.values() for name, shape in sources}
    present = set(checkpoint.names())
    missing = [name for name in shapes if name not in present]
    extra = sorted(name for name in present - shapes.keys() if not _is_harmless(name, tied))
    misshapen = [
        f"{name} has shape {checkpoint.shape(name)}, expected {shape}"
        for name, shape in shapes.items()
        if name in present and tuple(checkpoint.shape(name)) != shape
    ]
    problems = {"missing": sorted(missing), "extra": extra, "misshapen": sorted(misshapen)}
    found = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        where = getattr(checkpoint, "path", "checkpoint")
        raise CheckpointError(f"{where}: tensors do not fit the model; " + "; ".join(found))


def _is_harmless(name: str, tied: bool) -> bool:
    """Whether a tensor without a parameter can be passed over: it is a derived buffer or a copy of tied embeddings."""
    return bool(_DERIVED.search(name)) or (tied and name == "lm_head.weight")


class _Buffers(threading.local):
    """What a thread reads into. The CPU backend keeps it. For accelerators it is used again: to touch fresh memory may
    take longer than to read a disk."""

    def __init__(self) -> None:
        self._kept = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Like np.empty, aligned. Ends the use of what was given out before, unless the CPU backend has it."""
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        buffer = self._kept
        if buffer.size < num_bytes + _ALIGNMENT:
            buffer = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        if jax.default_backend() != "cpu":
            self._kept = buffer
        start = -buffer.ctypes.data % _ALIGNMENT
        return buffer[start : start + num_bytes].view(dtype).reshape(shape)


def _read(
    parts: Parts,
    parameter: nnx.Param,
    checkpoint: TensorSource,
    buffers: _Buffers,
    dtype: DTypeLike | None,
    shardings: Shardings | None,
) -> jax.Array:
    """One parameter on its devices. Projections are kept as [in, out]; where a checkpoint has them as [out, in], the
    CPU backend's buffer is written transposed and kept, and for accelerators the transposition is theirs, which is
    faster by far."""
    metadata = parameter.get_metadata()
    shape = tuple(parameter.shape)
    transpose, on_cpu = metadata.get("transpose", False), jax.default_backend() == "cpu"
    on_device = transpose and not on_cpu and not checkpoint.converted
    kept = np.dtype(dtype or parameter.dtype)

    def read(shape: tuple[int, ...], shard: int, where: jax.Device | jax.sharding.Sharding | None) -> jax.Array:
        host = buffers.empty(shape[::-1] if on_device else shape, kept)
        # the axis along which sources are joined comes first in what is filled
        parts.fill(host.T if transpose and not on_device else host, shard, checkpoint)
        array = place(host, where) if isinstance(where, jax.sharding.Sharding) else jax.device_put(host, where)
        if not on_cpu:
            array.block_until_ready()  # then the buffer is free
        return _transpose(array) if on_device else array

    if parts.shards == 1:
        axes = metadata["axes"][::-1] if on_device else metadata["axes"]
        return read(shape, 0, None if shardings is None else shardings(axes))
    sharding = None if shardings is None else shardings(metadata["axes"])
    assert sharding is not None, "a model in shards needs a mesh"

    def read_part(index: tuple[slice, ...], device: jax.Device) -> jax.Array:
        shard = max(part.start * parts.shards // size for part, size in zip(index, shape, strict=True))
        return read(tuple(part.stop - part.start for part in index), shard, device)

    return from_parts(shape, sharding, read_part)


@jax.jit
def _transpose(x: jax.Array) -> jax.Array:
    return x.T


@functools.cache
def _dummy(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    init: str,
    sharding: jax.sharding.Sharding | None,
    joined: tuple[int, tuple[Source, ...], int] | None,
):
    """A jitted (seed, index of the parameter) -> array, compiled once for all parameters alike. `joined`: the axis
    that is interleaved by shard, what is joined along it, and the shards."""

    def make(seed: jax.Array, index: jax.Array) -> jax.Array:
        if init != "normal":
            return {"zeros": jnp.zeros, "ones": jnp.ones}[init](shape, dtype)
        places: list[jax.Array] = [jnp.arange(size, dtype=jnp.uint32) for size in shape]
        sizes = list(shape)
        if joined is not None:
            axis, sources, shards = joined
            places[axis] = jnp.asarray(origins(sources, shards), jnp.uint32)
            sizes[axis] = sum(source.width for source in sources)
        return (_DUMMY_STDDEV * _normal(places, sizes, _mix(_mix(seed) ^ index))).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


def _normal(places: Sequence[jax.Array], sizes: Sequence[int], stream: jax.Array) -> jax.Array:
    """float32 values as if normal: hashed element numbers through the inverse error function. Unlike jax.random this
    is one elementwise fusion on every backend and under every sharding: no temporaries, and ten times faster.

    places: for each axis uint32[its length], where its elements stand in an array of `sizes`."""
    number = jnp.zeros((), jnp.uint32)
    for axis, (where, size) in enumerate(zip(places, sizes, strict=True)):
        number = number * np.uint32(size) + jnp.expand_dims(where, [a for a in range(len(sizes)) if a != axis])
    bits = _mix(number ^ stream) >> 9
    return np.float32(2**0.5) * jax.lax.erf_inv((bits.astype(jnp.float32) + 0.5) * 2**-22 - 1)


def _mix(x: jax.Array) -> jax.Array:
    """A bijective hash of uint32 (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)

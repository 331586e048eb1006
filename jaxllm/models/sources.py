"""What a parameter is made of: slices of a checkpoint's tensors, and which piece of each a tensor-parallel shard owns.

A fused projection is interleaved by shard: a shard holds its own piece of every slice side by side (its queries, its
keys, its values), so that what it computes can be cut apart without crossing shards.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from flax import nnx

from sharding import RULES, TENSOR


class TensorSource(Protocol):
    """What the loader asks of a checkpoint (`jaxllm.checkpoint.Checkpoint`): names are Hugging Face's."""

    @property
    def converted(self) -> bool: ...

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def num_bytes(self, name: str) -> int: ...

    def read_into(self, name: str, out: np.ndarray, index: tuple[slice, ...] | None = None) -> None: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """One slice of a parameter.

    Attributes:
      name: the tensor that it is read from.
      width: outputs of the slice in the checkpoint, all shards together. Where the shards do not divide it, the last
        ones are padded with zeros.
      start: where in the tensor it begins.
      copies: neighbouring shards that hold the same piece: key-value heads that are fewer than the shards.
    """

    name: str
    width: int
    start: int = 0
    copies: int = 1

    def shard_width(self, shards: int) -> int:
        """Outputs of one shard's piece, padding included."""
        return -(-self.width * self.copies // shards)

    def piece(self, shard: int, shards: int) -> slice:
        """The shard's outputs within the slice, without padding."""
        size = self.shard_width(shards)
        begin = min(shard // self.copies * size, self.width)
        return slice(begin, min(begin + size, self.width))


def origins(sources: Sequence[Source], shards: int) -> np.ndarray:
    """int32[shards * a shard's outputs]: where each output of the interleaved parameter stands in that of one shard;
    0 for padding."""
    found = []
    for shard in range(shards):
        at = 0
        for source in sources:
            piece = source.piece(shard, shards)
            place = np.zeros(source.shard_width(shards), np.int32)
            place[: piece.stop - piece.start] = np.arange(at + piece.start, at + piece.stop)
            found.append(place)
            at += source.width
    return np.concatenate(found)


class Parts:
    """How a parameter is put together. Dimensions are taken as the checkpoint stores them: `sources` are joined along
    the first.

    Attributes:
      sources: under their full names.
      rest: the other dimensions, whole.
      rows, columns: how many shards the first and the second dimension are dealt out among; one of them at most is.
      dealt_axis: the dimension that shards deal out wherever there are several; None: they all hold the whole.
      joined_axis: where the first dimension stands in the parameter.
    """

    def __init__(self, path: tuple, parameter: nnx.Param):
        metadata = parameter.get_metadata()
        transpose, axes, shards = metadata.get("transpose", False), metadata["axes"], metadata["shards"]
        stored = metadata.get("stored", parameter.shape)
        if transpose:
            stored, axes = stored[::-1], axes[::-1]
        dealt = [shards if RULES[axis] == TENSOR else 1 for axis in axes] + [1]
        self.dealt_axis = next((index for index, axis in enumerate(axes) if RULES[axis] == TENSOR), None)
        self.rest, (self.rows, self.columns) = stored[1:], dealt[:2]
        self.joined_axis = parameter.ndim - 1 if transpose else 0
        if "sources" in metadata:
            prefix = "".join(f"{name}." for name in path[:-2])
            self.sources = tuple(dataclasses.replace(s, name=prefix + s.name) for s in metadata["sources"])
        else:
            self.sources = (Source(".".join(map(str, path)), stored[0]),)

    @property
    def shards(self) -> int:
        return self.rows * self.columns

    def fill(self, out: np.ndarray, shard: int, checkpoint: TensorSource) -> None:
        """Reads a shard's part."""
        across: tuple[slice, ...] = tuple(slice(0, size) for size in self.rest)
        if self.columns > 1:
            width = self.rest[0] // self.columns
            across = (slice(shard * width, (shard + 1) * width), *across[1:])
        shapes, end = dict(self.tensors()), 0
        for source in self.sources:
            piece = source.piece(shard if self.rows > 1 else 0, self.rows)
            index = (slice(source.start + piece.start, source.start + piece.stop), *across)
            start, end = end, end + source.shard_width(self.rows)
            padding = start + piece.stop - piece.start
            if tuple(part.stop - part.start for part in index) == shapes[source.name]:
                checkpoint.read_into(source.name, out[start:padding])
            elif padding > start:
                checkpoint.read_into(source.name, out[start:padding], index)
            out[padding:end] = 0

    def converted(self) -> "Parts":
        """The same as `jaxllm convert` stores it: each source is a tensor of its own, called by the name of the one
        that it comes from, and by where it begins there if that one holds several."""
        names = [source.name for source in self.sources]
        found = copy.copy(self)
        found.sources = tuple(
            dataclasses.replace(s, name=s.name if names.count(s.name) == 1 else f"{s.name}.{s.start}", start=0)
            for s in self.sources
        )
        return found

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Checkpoint names and shapes of what the parameter is made of, in order."""
        widths: dict[str, int] = {}
        for source in self.sources:
            widths[source.name] = widths.get(source.name, 0) + source.width
        return [(name, (width, *self.rest)) for name, width in widths.items()]

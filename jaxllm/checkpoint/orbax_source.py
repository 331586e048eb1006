"""A directory that `jaxllm convert` wrote: config.json, tokenizer files and, in `weights/`, an Orbax checkpoint.

Its arrays are the slices that the engine's parameters are made of, under their Hugging Face names and projections as
[in, out], so that none depends on a mesh. They are zarr 3 without compression, and each chunk ends with its CRC-32C,
which TensorStore, Orbax's own reader of arrays, compares while it reads. `weights.json` beside them lists the arrays
and all files: of the chunks their sizes and those checksums, which a whole chunk in another's place does not have; of
the others their sizes and CRC-32, and those of config.json and the tokenizer's files, which tokens depend on as they do
on weights. It is written last: without it the checkpoint is not whole.

Reading goes through TensorStore alone, straight into the buffer that becomes the parameter: to import Orbax takes
longer than to read some models, and what it restores is in memory of its own.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.safetensors_source import HuggingFaceDirectory, read_json
from jaxllm.errors import CheckpointError, UnsupportedModelError

WEIGHTS, MANIFEST = "weights", "weights.json"
FORMAT = 4
READ = (2, 3, FORMAT)  # 2 knows nothing of the files beside `weights`, 2 and 3 nothing of the chunks' checksums
# Of the files that are copied, those that are checked. Sampling's defaults and chat templates are the user's to change.
_CHECKED = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CHUNKS = "c"  # zarr's name for the folder of an array's chunks
_PIECES = 16  # that an array's chunks are cut into along the axis that shards deal out: each reads its own alone
_LEAST_CHUNK, _LARGEST_CHUNK = 1 << 20, 8 << 20  # bytes: worth a file of its own, and many at once in memory
_READS = 16  # files that are read at once
_CHUNKS_AT_ONCE = 4  # of an array, in memory beside it: no more than the processors can check and copy meanwhile
_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float32", "float16", "bfloat16", "float64")}


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array of the checkpoint.

    Attributes:
      shape: as Hugging Face has it, [out, in] for a projection.
      transposed: it lies in the file as [in, out].
      dealt_axis: the axis of `shape` that shards deal out; None: they all hold the whole.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    transposed: bool = False
    dealt_axis: int | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def metadata(self) -> dict[str, Any]:
        """What zarr's driver in TensorStore makes the array of."""
        turn = -1 if self.transposed else 1
        return {
            "shape": self.shape[::turn],
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self._chunk_shape()[::turn]}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        }

    def _chunk_shape(self) -> list[int]:
        """Up to 16 pieces for shards, and these cut along the file's first axis if they are large."""
        chunk, pieces = list(self.shape), _PIECES if self.dealt_axis is not None else 1
        while pieces > 1 and self.num_bytes < pieces * _LEAST_CHUNK:
            pieces //= 2
        if self.dealt_axis is not None:
            chunk[self.dealt_axis] = -(-chunk[self.dealt_axis] // pieces)
        first = len(chunk) - 1 if self.transposed else 0
        chunk[first] = -(-chunk[first] // -(-math.prod(chunk) * self.dtype.itemsize // _LARGEST_CHUNK))
        return chunk


def write_manifest(directory: Path, arrays: Mapping[str, StoredArray]) -> None:
    """Lists the arrays and the files of a checkpoint that has been written."""
    root = directory / WEIGHTS
    chunks, files = {}, {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name, size = path.relative_to(root).as_posix(), path.stat().st_size
        if is_chunk(name):
            chunks[name] = size, _checksum(path)
        else:
            files[name] = _size_and_crc32(path)
    copied = {path.name: _size_and_crc32(path) for path in stored_files(directory) if path.name in _CHECKED}
    content = {
        "format": FORMAT,
        "arrays": {name: [list(a.shape), a.dtype.name, a.transposed] for name, a in arrays.items()},
        "chunks": chunks,
        "files": files,
        "copied": copied,
    }
    with open(directory / MANIFEST, "w") as file:
        json.dump({"crc32": _crc32_of_content(content), **content}, file)
        file.flush()
        os.fsync(file.fileno())


def _size_and_crc32(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    return len(content), zlib.crc32(content)


def _checksum(path: Path | str) -> str:
    """What a chunk ends with: its CRC-32C, as hexadecimal digits."""
    with open(path, "rb") as file:
        file.seek(-4, os.SEEK_END)
        return file.read().hex()


def is_chunk(name: str) -> bool:
    """Whether a file, by its path within `weights`, is a chunk of an array."""
    return name.split("/")[1:2] == [CHUNKS]


def _crc32_of_content(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


class OrbaxCheckpoint(HuggingFaceDirectory):
    """See `Checkpoint`; its tensors are the slices of parameters. When it is made, every file's presence and size are
    checked, and what the small ones hold; what a chunk holds is checked as it is read.

    Attributes:
      arrays: by name.
    """

    converted = True

    def __init__(self, path: str | os.PathLike[str]):
        """Opens a directory.

        Raises:
          ModelNotFoundError: there is no config.json.
          CheckpointError: the checkpoint is not whole, or a file of it is missing, truncated or altered.
        """
        super().__init__(path)
        if not (self.path / MANIFEST).is_file():
            raise CheckpointError(f"{self.path}: not whole: {MANIFEST}, which is written last, is missing")
        content = self._read_manifest()
        self.arrays = {
            name: StoredArray(tuple(shape), _DTYPES[dtype], transposed)
            for name, (shape, dtype, transposed) in content["arrays"].items()
        }
        self._checksums: dict[str, str] = {}  # by chunk
        for name, of_chunk in content["chunks"].items():
            size, *checksum = of_chunk if isinstance(of_chunk, list) else [of_chunk]
            _check_size(f"{self.weights}/{name}", size)
            if checksum:
                self._checksums[name] = checksum[0]
        for place, files in ((self.path, content.get("copied", {})), (self.weights, content["files"])):
            for name, (size, crc32) in files.items():
                _check_size(f"{place}/{name}", size)
                if zlib.crc32((place / name).read_bytes()) != crc32:
                    raise CheckpointError(f"{place / name}: altered: its checksum does not fit")

    @property
    def weights(self) -> Path:
        """The directory that Orbax reads."""
        return self.path / WEIGHTS

    def _read_manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        content = read_json(path)
        if content.get("format", FORMAT) not in READ:
            formats = " and ".join(map(str, READ))
            raise CheckpointError(
                f"{path}: format {content['format']!r}; jaxllm reads formats {formats}: convert it anew"
            )
        if content.pop("crc32", None) != _crc32_of_content(content):
            raise CheckpointError(f"{path}: altered: its checksum does not fit")
        return content

    def names(self) -> list[str]:
        return list(self.arrays)

    def _array(self, name: str) -> StoredArray:
        if name not in self.arrays:
            raise CheckpointError(f"{self.path}: array {name!r} is missing")
        return self.arrays[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._array(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._array(name).dtype

    def num_bytes(self, name: str) -> int:
        return self._array(name).num_bytes

    def read(self, name: str, dtype: np.dtype | type | str | None = None) -> np.ndarray:
        array = self._array(name)
        stored = np.empty(array.shape[:: -1 if array.transposed else 1], dtype or array.dtype)
        found = stored.T if array.transposed else stored
        self.read_into(name, found)
        return found

    def read_into(self, name: str, out: np.ndarray, index: tuple[slice, ...] | None = None) -> None:
        import tensorstore as ts  # here: it takes time to import

        self._check_shape(name, out, index)
        array = self._array(name)
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self.weights}/{name}"},
            "fill_missing_data_reads": False,
        }
        under_way: collections.deque[Any] = collections.deque()
        try:
            store = ts.open(spec, read=True, context=self._context).result()
            store = store.T if array.transposed else store
            cast = store if out.dtype == array.dtype else ts.cast(store, out.dtype)
            chunk: Any = store.chunk_layout.read_chunk.shape
            pieces = list(_by_chunk(chunk, index or _whole(array.shape)))
            for piece, place in pieces:
                if len(under_way) == _CHUNKS_AT_ONCE:
                    under_way.popleft().result()
                under_way.append(ts.array(out[place]).write(cast[piece][ts.d[:].translate_to[0]]))
            while under_way:
                under_way.popleft().result()
            for piece, _ in pieces:  # now, when what has been read is still in the system's cache
                number = [str(part.start // size) for part, size in zip(piece, chunk, strict=True)]
                self._check_place("/".join((name, CHUNKS, *number[:: -1 if array.transposed else 1])))
        except ValueError as error:  # names the file
            raise CheckpointError(f"{self.path}: array {name!r} cannot be read: {error}") from error
        finally:
            for one in under_way:  # may still be writing to `out`
                one.exception()

    def _check_place(self, chunk: str) -> None:
        """Raises CheckpointError if it is another chunk than the one that was written there."""
        path = f"{self.weights}/{chunk}"
        if self._checksums and _checksum(path) != self._checksums.get(chunk):
            raise CheckpointError(f"{path}: altered: it holds another chunk than the one that was written there")

    @functools.cached_property
    def _context(self) -> Any:
        try:
            import tensorstore
        except ImportError as error:
            raise UnsupportedModelError(f"{self.path}: Orbax checkpoints need the extra orbax: {error}") from error
        return tensorstore.Context({"file_io_concurrency": {"limit": _READS}})

    def release_memory(self) -> None:
        """Nothing is mapped."""


def _check_size(path: str, expected: int) -> None:
    """Raises CheckpointError."""
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if size != expected:
        kind = "truncated" if size < expected else "altered"
        raise CheckpointError(f"{path}: {kind}: {size} bytes instead of {expected}")


def _whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def _by_chunk(chunk: Sequence[int], index: tuple[slice, ...]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """The part of an array, cut where its chunks end: each piece's place in the array, and within the part."""
    cuts = []
    for size, part in zip(chunk, index, strict=True):
        ends = [*range(part.start // size * size + size, part.stop, size), part.stop]
        cuts.append([slice(start, end) for start, end in itertools.pairwise([part.start, *ends])])
    for piece in itertools.product(*cuts):
        yield piece, tuple(slice(p.start - i.start, p.stop - i.start) for p, i in zip(piece, index, strict=True))


def stored_files(path: Path) -> Iterator[Path]:
    """What a converted checkpoint takes over from a Hugging Face directory: configuration, tokenizer and templates."""
    for found in sorted(path.iterdir()):
        if (
            found.is_file()
            and found.suffix in (".json", ".jinja", ".model", ".txt")
            and not found.name.endswith(".index.json")
        ):
            yield found

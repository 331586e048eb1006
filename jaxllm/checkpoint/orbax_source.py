"""A directory that `jaxllm convert` wrote: config.json, tokenizer files and, in `weights/`, an Orbax checkpoint.

Its arrays are the slices that the engine's parameters are made of, each as [in, out] and under its Hugging Face name,
so that none depends on a mesh. `weights.json` beside them lists the arrays, and every file of them with its size and
CRC-32. It is written last: without it the checkpoint is not whole.
"""

import concurrent.futures
import dataclasses
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.safetensors_source import HuggingFaceDirectory, read_json
from jaxllm.errors import CheckpointError

WEIGHTS, MANIFEST = "weights", "weights.json"
FORMAT = 1
_BLOCK = 4 << 20  # bytes that are hashed at once
_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in ("float32", "float16", "bfloat16", "float64", "int8", "int32", "float8_e4m3fn", "float8_e5m2")
}


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array of the checkpoint."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file of the checkpoint."""

    num_bytes: int
    crc32: int


def crc32_of(path: Path) -> int:
    """The CRC-32 of a file's bytes (that of zlib). Raises OSError."""
    found, buffer = 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found = zlib.crc32(buffer[:count], found)
    return found


def write_manifest(directory: Path, arrays: Mapping[str, StoredArray]) -> None:
    """Lists the arrays and the files of a checkpoint that has been written."""
    root = directory / WEIGHTS
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    content = {
        "format": FORMAT,
        "arrays": {name: [list(array.shape), array.dtype.name] for name, array in arrays.items()},
        "files": {path.relative_to(root).as_posix(): [path.stat().st_size, crc32_of(path)] for path in paths},
    }
    with open(directory / MANIFEST, "w") as file:
        json.dump({"crc32": _crc32_of_content(content), **content}, file)
        file.flush()
        os.fsync(file.fileno())


def _crc32_of_content(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


class OrbaxCheckpoint(HuggingFaceDirectory):
    """See `Checkpoint`; here names are those of stored arrays. Every file's presence and size is checked when it is
    made; what they hold, by `verify`. The engine reads it with `jaxllm.models.restore`.

    Attributes:
      arrays: by name.
      files: by their path within `weights`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens a directory.

        Raises:
          ModelNotFoundError: there is no config.json.
          CheckpointError: the checkpoint is not whole, or a file of it is missing, truncated or of another size.
        """
        super().__init__(path)
        if not (self.path / MANIFEST).is_file():
            raise CheckpointError(f"{self.path}: not whole: {MANIFEST}, which is written last, is missing")
        self.arrays, self.files = self._read_manifest()
        for name, file in self.files.items():
            try:
                size = (self.weights / name).stat().st_size
            except OSError as error:
                raise CheckpointError(f"{self.weights / name}: cannot be read ({error.strerror})") from error
            if size != file.num_bytes:
                kind = "truncated" if size < file.num_bytes else "altered"
                raise CheckpointError(f"{self.weights / name}: {kind}: {size} bytes instead of {file.num_bytes}")

    @property
    def weights(self) -> Path:
        """The directory that Orbax reads."""
        return self.path / WEIGHTS

    def _read_manifest(self) -> tuple[dict[str, StoredArray], dict[str, StoredFile]]:
        path = self.path / MANIFEST
        content = read_json(path)
        if content.get("format", FORMAT) != FORMAT:
            raise CheckpointError(
                f"{path}: format {content['format']!r}; jaxllm reads format {FORMAT}: convert it anew"
            )
        if content.pop("crc32", None) != _crc32_of_content(content):
            raise CheckpointError(f"{path}: altered: its checksum does not fit")
        arrays = {name: StoredArray(tuple(shape), _DTYPES[dtype]) for name, (shape, dtype) in content["arrays"].items()}
        return arrays, {name: StoredFile(*entry) for name, entry in content["files"].items()}

    def verify(self, *, share: int = 0, shares: int = 1, threads: int | None = None) -> None:
        """Reads files and compares their checksums.

        Args:
          share, shares: which part of the files to read, for hosts that deal them out.
          threads: None: one for each core, at most 8.

        Raises:
          CheckpointError: a file is altered, and named.
        """
        threads = threads or min(8, os.cpu_count() or 1)

        def check(name: str) -> None:
            path = self.weights / name
            try:
                found = crc32_of(path)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
            if found != self.files[name].crc32:
                raise CheckpointError(f"{path}: altered: its checksum does not fit")

        with concurrent.futures.ThreadPoolExecutor(threads, "verify") as pool:
            checks = [pool.submit(check, name) for name in list(self.files)[share::shares]]
            try:
                for done in concurrent.futures.as_completed(checks):
                    done.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

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
        return np.asarray(self._store(name).read().result(), dtype)

    def read_into(self, name: str, out: np.ndarray, index: tuple[slice, ...] | None = None) -> None:
        self._check_shape(name, out, index)
        store = self._store(name)
        out[...] = (store if index is None else store[index]).read().result()

    def _store(self, name: str) -> Any:
        import tensorstore  # here: it takes time to import

        self._array(name)
        place = {"driver": "file", "path": str(self.weights / name)}
        try:
            spec = {"driver": "zarr", "kvstore": place, "fill_missing_data_reads": False}
            return tensorstore.open(spec, read=True).result()
        except ValueError as error:
            raise CheckpointError(f"{self.weights / name}: {error}") from error

    def release_memory(self) -> None:
        """Nothing is mapped."""


def stored_files(path: Path) -> Iterator[Path]:
    """What a converted checkpoint takes over from a Hugging Face directory: configuration, tokenizer and templates."""
    for found in sorted(path.iterdir()):
        if (
            found.is_file()
            and found.suffix in (".json", ".jinja", ".model", ".txt")
            and not found.name.endswith(".index.json")
        ):
            yield found

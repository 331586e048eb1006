"""A Hugging Face directory as a checkpoint: config.json, one safetensors file or several, tokenizer files.

The format: https://huggingface.co/docs/safetensors. It is parsed here so that every error names the file and tensor,
bfloat16 and float8 come as ml_dtypes, and a tensor is a view of the memory map until somebody copies it.
"""

import json
import math
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.base import Checkpoint
from jaxllm.errors import CheckpointError, ModelNotFoundError

if TYPE_CHECKING:
    from jaxllm.text.tokenizer import Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20  # what the safetensors library allows
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      CheckpointError: it cannot be read or is no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return value


class SafetensorsFile:
    """One memory-mapped safetensors file.

    Attributes:
      path: the file.
      tensors: name -> (dtype, shape, first byte in the file).
    """

    def __init__(self, path: Path):
        """Parses the header.

        Raises:
          CheckpointError: the file is missing, truncated or corrupt.
        """
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise CheckpointError(f"{path}: truncated: {size} bytes")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        length = int.from_bytes(self._map[:8], "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: truncated or corrupt: a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(self._map[8 : 8 + length])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: corrupt: the header is no JSON: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: corrupt: the header is no JSON object")
        header.pop("__metadata__", None)
        self.tensors = {name: self._entry(name, entry, 8 + length, size) for name, entry in header.items()}

    def release_memory(self) -> None:
        """See `Checkpoint.release_memory`."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _entry(self, name: str, entry: Any, start: int, size: int) -> tuple[np.dtype, tuple[int, ...], int]:
        try:
            dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise CheckpointError(f"{self.path}: corrupt: entry of tensor {name!r}: {str(entry)[:200]}")
        if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name!r} has dtype {dtype_name!r}, which jaxllm does not read")
        dtype = _DTYPES[dtype_name]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: corrupt: tensor {name!r} of shape {shape} and dtype {dtype_name} in {end - begin} bytes"
            )
        if start + end > size:
            raise CheckpointError(
                f"{self.path}: truncated: tensor {name!r} needs bytes up to {start + end}, the file ends at {size}"
            )
        return dtype, shape, start + begin

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the memory map."""
        dtype, shape, begin = self.tensors[name]
        # np.ndarray rather than frombuffer: it takes scalars and empty shapes, and offsets that are not aligned
        return np.ndarray(shape, dtype, buffer=self._map, offset=begin) if math.prod(shape) else np.empty(shape, dtype)


class HuggingFaceDirectory(Checkpoint):
    """A directory with config.json and tokenizer files, whatever its weights are stored in."""

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the configuration.

        Raises:
          ModelNotFoundError: there is no config.json.
          CheckpointError: a file is corrupt.
        """
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise ModelNotFoundError(f"{self.path}: no config.json in this directory")
        self.config = read_json(self.path / "config.json")
        generation = self.path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self._tokenizer: Tokenizer | None = None

    def tokenizer(self) -> "Tokenizer":
        if self._tokenizer is None:
            from jaxllm.text.tokenizer_files import from_directory  # here: tokenizers takes time to import

            self._tokenizer = from_directory(self.path)
        return self._tokenizer


class SafetensorsCheckpoint(HuggingFaceDirectory):
    """See `Checkpoint`. Shards are opened, and their headers checked, when it is made."""

    def __init__(self, path: str | os.PathLike[str]):
        """Opens a directory.

        Raises:
          ModelNotFoundError: there is no config.json.
          CheckpointError: a file is corrupt or truncated, a shard is missing, or a listed tensor is absent.
        """
        super().__init__(path)
        self._files = self._open_files()

    def _open_files(self) -> dict[str, SafetensorsFile]:
        """Tensor name -> the open file that holds it. Empty if the directory holds no weights at all."""
        if (self.path / SINGLE).is_file():
            file = SafetensorsFile(self.path / SINGLE)
            return dict.fromkeys(file.tensors, file)
        if not (self.path / INDEX).is_file():
            return {}
        listed = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
            raise CheckpointError(f"{self.path / INDEX}: corrupt: no weight_map")
        shards: dict[str, SafetensorsFile] = {}
        for shard in dict.fromkeys(listed.values()):
            if Path(shard).name != shard:
                raise CheckpointError(f"{self.path / INDEX}: shard {shard!r} lies outside the directory")
            if not (self.path / shard).is_file():
                raise CheckpointError(f"{self.path}: shard {shard!r}, listed in {INDEX}, is missing")
            shards[shard] = SafetensorsFile(self.path / shard)
        absent = [f"{name!r} ({shard})" for name, shard in listed.items() if name not in shards[shard].tensors]
        if absent:
            shown = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
            raise CheckpointError(f"{self.path}: tensors listed in {INDEX} but absent from their shards: {shown}")
        return {name: shards[shard] for name, shard in listed.items()}

    def names(self) -> list[str]:
        return list(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def _file(self, name: str) -> SafetensorsFile:
        if name in self._files:
            return self._files[name]
        if not self._files:
            pickles = [found.name for pattern in _PICKLES for found in self.path.glob(pattern)]
            hint = f" ({pickles[0]} is a pickle, which can carry code: convert it to safetensors)" if pickles else ""
            raise CheckpointError(f"{self.path}: neither {SINGLE} nor {INDEX} is here{hint}")
        raise CheckpointError(f"{self.path}: tensor {name!r} is missing")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).tensors[name][1]

    def dtype(self, name: str) -> np.dtype:
        return self._file(name).tensors[name][0]

    def num_bytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str, dtype: np.dtype | type | str | None = None) -> np.ndarray:
        stored = self._file(name).read(name)
        return stored if dtype is None else stored.astype(dtype, copy=False)

    def read_into(self, name: str, out: np.ndarray, index: tuple[slice, ...] | None = None) -> None:
        self._check_shape(name, out, index)
        stored = self._file(name).read(name)
        out[...] = stored if index is None else stored[index]

    def release_memory(self) -> None:
        for file in set(self._files.values()):
            file.release_memory()

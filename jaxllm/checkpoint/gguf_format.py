"""The GGUF container: header, metadata and tensor table, parsed over a memory map with every length checked.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader builds a numpy
array per string and needs seconds for a vocabulary; this one makes plain Python values in one pass.
"""

import dataclasses
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.errors import CheckpointError, ModelNotFoundError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_ARRAY_DEPTH = 4
MAX_ALIGNMENT = 1 << 20
MAX_KEY_BYTES = 1 << 16

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_ARRAY_DTYPES = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8"}
_ARRAY_DTYPES[12] = "<f8"
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]

# ggml type number -> (name, elements a block, bytes a block), from ggml.h. Those that jaxllm reads are in gguf_quants;
# the others are known by name only, so that the error can say what a file holds.
GGML_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclasses.dataclass(frozen=True, slots=True)
class GgufTensor:
    """A row of the tensor table.

    Attributes:
      name: GGUF's name, e.g. "blk.0.attn_q.weight".
      shape: row-major, slowest axis first ([out, in] for a projection): GGUF's own order reversed.
      type_name: ggml's type, e.g. "Q4_1".
      offset: where its bytes begin, from the start of the file.
      num_bytes: how many bytes it takes.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    num_bytes: int


class GgufFile:
    """An open GGUF file. Strings come as str, numeric arrays as numpy arrays, other arrays as lists.

    Attributes:
      path: the file.
      metadata: key -> value.
      tensors: GGUF name -> GgufTensor, in file order.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Parses the header.

        Raises:
          ModelNotFoundError: there is no such file.
          CheckpointError: the file is no GGUF file, is of another version, or is corrupt or truncated.
        """
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 24:
                    raise CheckpointError(f"{self.path}: {size} bytes are too few for a GGUF header")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelNotFoundError(f"{self.path}: no such file") from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error
        self.metadata, self.tensors = _Parser(self._map, size, self.path).parse()

    def release_memory(self) -> None:
        """See `Checkpoint.release_memory`."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def raw(self, tensor: GgufTensor) -> np.ndarray:
        """The tensor's bytes, uint8 [num_bytes], a read-only view of the memory map."""
        return np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)


class _Parser:
    """A cursor over the file; every advance is checked against the file's end first."""

    def __init__(self, data: mmap.mmap, size: int, path: Path):
        self._data, self._size, self._path, self._at = data, size, path, 0

    def _fail(self, what: str, at: int | None = None) -> CheckpointError:
        return CheckpointError(f"{self._path}: {what} at byte {self._at if at is None else at}")

    def _scalar(self, code: struct.Struct, what: str) -> Any:
        if self._at + code.size > self._size:
            raise self._fail(f"truncated: the file ends in {what}")
        (value,) = code.unpack_from(self._data, self._at)
        self._at += code.size
        return value

    def _count(self, what: str, least_bytes: int) -> int:
        """A 64-bit count of things of at least `least_bytes` each: no more than the rest of the file holds."""
        at = self._at
        count = self._scalar(_U64, what)
        if count * least_bytes > self._size - self._at:
            raise self._fail(f"corrupt: {what} {count} exceeds what the file holds", at)
        return count

    def _string(self, what: str, limit: int | None = None) -> str:
        at = self._at
        length = self._count(f"length of {what}", 1)
        if limit is not None and length > limit:
            raise self._fail(f"corrupt: {what} of {length} bytes", at)
        try:
            text = self._data[self._at : self._at + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self._fail(f"corrupt: {what} is not UTF-8", at) from None
        self._at += length
        return text

    def _strings(self, count: int, what: str) -> list[str]:
        # the hot loop of a vocabulary: the same checks as _string, without its calls
        data, size, at = self._data, self._size, self._at
        unpack, result = _U64.unpack_from, []
        for index in range(count):
            begin = at + 8
            if begin > size or (end := begin + unpack(data, at)[0]) > size:
                raise self._fail(f"truncated: string {index} of {what}", at)
            try:
                result.append(data[begin:end].decode("utf-8"))
            except UnicodeDecodeError:
                raise self._fail(f"corrupt: string {index} of {what} is not UTF-8", at) from None
            at = end
        self._at = at
        return result

    def _value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self._string(what)
        if kind != _ARRAY:
            raise self._fail(f"corrupt: unknown value type {kind} of {what}")
        if depth == MAX_ARRAY_DEPTH:
            raise self._fail(f"corrupt: {what} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        kind = self._scalar(_U32, what)
        if kind in _ARRAY_DTYPES:
            dtype = np.dtype(_ARRAY_DTYPES[kind])
            count = self._count(f"count of {what}", dtype.itemsize)
            array = np.frombuffer(self._data, dtype, count, self._at)
            self._at += array.nbytes
            return array
        if kind == _STRING:
            return self._strings(self._count(f"count of {what}", 8), what)
        return [self._value(kind, what, depth + 1) for _ in range(self._count(f"count of {what}", 12))]

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._data[:4] != MAGIC:
            raise self._fail(f"not a GGUF file: begins with {self._data[:4]!r}")
        self._at = 4
        version = self._scalar(_U32, "the version")
        if version not in VERSIONS:
            hint = " (big-endian)" if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS else ""
            raise self._fail(f"GGUF version {version}{hint}; jaxllm reads {VERSIONS}, little-endian", 4)
        num_tensors = self._count("tensor count", 24)
        num_pairs = self._count("metadata count", 13)
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            at = self._at
            key = self._string("a metadata key", MAX_KEY_BYTES)
            if key in metadata:
                raise self._fail(f"corrupt: metadata key {key!r} stands twice", at)
            metadata[key] = self._value(self._scalar(_U32, f"type of {key!r}"), repr(key))
        rows = [self._tensor_row() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise CheckpointError(f"{self._path}: corrupt: general.alignment={alignment!r} is no power of two")
        return metadata, self._place(rows, -(-self._at // alignment) * alignment, alignment)

    def _tensor_row(self) -> GgufTensor:
        """One row of the table, its offset still relative to the data section."""
        at = self._at
        name = self._string("a tensor name", MAX_KEY_BYTES)
        num_dimensions = self._scalar(_U32, f"rank of {name!r}")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._fail(f"corrupt: tensor {name!r} has {num_dimensions} dimensions", at)
        shape = tuple(self._scalar(_U64, f"shape of {name!r}") for _ in range(num_dimensions))[::-1]
        kind = self._scalar(_U32, f"type of {name!r}")
        if kind not in GGML_TYPES:
            raise self._fail(f"tensor {name!r} has unknown type {kind}", at)
        type_name, block, block_bytes = GGML_TYPES[kind]
        if shape[-1] % block:
            raise self._fail(f"corrupt: rows of {name!r} hold {shape[-1]} values, no multiple of {block}", at)
        num_bytes = math.prod(shape) // block * block_bytes
        return GgufTensor(name, shape, type_name, self._scalar(_U64, f"offset of {name!r}"), num_bytes)

    def _place(self, rows: list[GgufTensor], start: int, alignment: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for row in rows:
            if row.name in tensors:
                raise CheckpointError(f"{self._path}: corrupt: tensor {row.name!r} stands twice")
            offset = start + row.offset
            if row.offset % alignment:
                raise CheckpointError(f"{self._path}: corrupt: tensor {row.name!r} is misaligned at byte {offset}")
            if offset + row.num_bytes > self._size:
                raise CheckpointError(
                    f"{self._path}: truncated: tensor {row.name!r} needs bytes {offset} to {offset + row.num_bytes}, "
                    f"the file ends at {self._size}"
                )
            tensors[row.name] = dataclasses.replace(row, offset=offset)
        return tensors

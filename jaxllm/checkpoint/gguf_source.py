"""A GGUF file as a checkpoint: Hugging Face names, Hugging Face layouts, dequantized on the way."""

import math
import os
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.checkpoint import gguf_config, gguf_names, gguf_quants
from jaxllm.checkpoint.base import Checkpoint
from jaxllm.checkpoint.gguf_format import GgufFile, GgufTensor
from jaxllm.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from jaxllm.text.tokenizer import Tokenizer


class GgufCheckpoint(Checkpoint):
    """See `Checkpoint`."""

    def __init__(self, path: str | os.PathLike[str]):
        """Parses the header; no tensor is read.

        Raises:
          ModelNotFoundError: there is no such file.
          CheckpointError: the file is corrupt or truncated.
          UnsupportedModelError: its architecture or a tensor's type is not one that jaxllm reads.
        """
        self._file = GgufFile(path)
        self.path = self._file.path
        self._arch = gguf_config.architecture(self._file)
        self.config = gguf_config.make_config(self._file)
        self.generation_config = gguf_config.make_generation_config(self._file)
        self._tokenizer: Tokenizer | None = None
        self._tensors: dict[str, GgufTensor] = {}
        for tensor in self._file.tensors.values():
            if gguf_names.is_ignored(tensor.name):
                continue
            if tensor.type_name not in gguf_quants.SUPPORTED:
                supported = ", ".join(gguf_quants.SUPPORTED)
                raise UnsupportedModelError(
                    f"{path}: tensor {tensor.name!r} is {tensor.type_name}; jaxllm reads {supported}"
                )
            self._tensors[gguf_names.hugging_face_name(tensor.name, self._arch)] = tensor

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        return gguf_quants.stored_dtype(self._tensor(name).type_name)

    def num_bytes(self, name: str) -> int:
        return self._tensor(name).num_bytes

    def read(self, name: str, dtype: np.dtype | type | str | None = None) -> np.ndarray:
        out = np.empty(self.shape(name), self.dtype(name) if dtype is None else dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: np.ndarray, index: tuple[slice, ...] | None = None) -> None:
        self._check_shape(name, out, index)
        if out.size == 0:
            return
        tensor, shape = self._tensor(name), self.shape(name)
        layout = gguf_names.layout(
            tensor.name, self._arch, self.config["num_attention_heads"], self.config["num_key_value_heads"]
        )
        if layout.heads and shape[0] % (2 * layout.heads):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has {shape[0]} rows, no multiple of twice its {layout.heads} heads"
            )
        rows, (first, last), (left, right) = _as_matrix(out, shape, index, as_column=layout.heads > 0)
        length = 1 if layout.heads and len(shape) == 1 else shape[-1]
        total = math.prod(shape) // length
        order = layout.row_order(total)
        raw, step = self._file.raw(tensor), gguf_quants.rows_per_chunk(length)
        # where rows are permuted, those of a part may lie anywhere in the file
        wanted = range(first, last) if order is None else range(total)
        for begin in range(wanted.start, wanted.stop, step):
            end = min(begin + step, wanted.stop)
            places = None if order is None else order[begin:end] - first
            mine = None if places is None else (places >= 0) & (places < last - first)
            if mine is not None and not mine.any():
                continue
            values = gguf_quants.dequantize_rows(raw, tensor.type_name, length, begin, end)
            if layout.offset:
                values = values.astype(np.float32) + np.float32(layout.offset)
            if places is None or mine is None:
                rows[begin - first : end - first] = values[:, left:right]
            elif mine.all():
                rows[places] = values[:, left:right]
            else:
                rows[places[mine]] = values[mine, left:right]

    def release_memory(self) -> None:
        self._file.release_memory()

    def tokenizer(self) -> "Tokenizer":
        if self._tokenizer is None:
            from jaxllm.text.gguf_tokenizer import from_gguf  # here: tokenizers takes time to import

            self._tokenizer = from_gguf(self._file.metadata, str(self.path), self._arch)
        return self._tokenizer


def _as_matrix(
    out: np.ndarray, shape: tuple[int, ...], index: tuple[slice, ...] | None, *, as_column: bool
) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """A view of `out` as a matrix, and which rows and columns of the whole tensor's matrix it holds. A vector is a row,
    or a column where its elements are permuted as rows are; a stack of matrices is one tall one."""
    whole = tuple(slice(0, size) for size in shape)
    bounds = [part.indices(size)[:2] for part, size in zip(index or whole, shape, strict=True)]
    if len(shape) == 1:
        return (out[:, None], bounds[0], (0, 1)) if as_column else (out[None], (0, 1), bounds[0])
    middle = math.prod(shape[1:-1])
    if any(bound != (0, size) for bound, size in zip(bounds[1:-1], shape[1:-1], strict=True)):
        raise ValueError(f"a part of {shape} must have its middle dimensions whole, not {index}")
    # splitting an axis of a view never copies
    rows = out if out.ndim == 2 else np.reshape(out, (-1, out.shape[-1]), copy=False)
    return rows, (bounds[0][0] * middle, bounds[0][1] * middle), bounds[-1]

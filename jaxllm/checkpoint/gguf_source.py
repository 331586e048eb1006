"""A GGUF file as a checkpoint: Hugging Face names, Hugging Face layouts, dequantized on the way."""

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

    def read_into(self, name: str, out: np.ndarray) -> None:
        self._check_shape(name, out)
        if out.size == 0:
            return
        tensor = self._tensor(name)
        layout = gguf_names.layout(
            tensor.name, self._arch, self.config["num_attention_heads"], self.config["num_key_value_heads"]
        )
        if layout.heads and out.shape[0] % (2 * layout.heads):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has {out.shape[0]} rows, no multiple of twice its {layout.heads} heads"
            )
        # vectors and stacks of matrices are written as matrices; splitting an axis of a view never copies
        rows = out[:, None] if layout.heads and out.ndim == 1 else out[None] if out.ndim == 1 else out
        if rows.ndim > 2:
            rows = np.reshape(rows, (-1, rows.shape[-1]), copy=False)
        order = layout.row_order(len(rows))
        raw, length = self._file.raw(tensor), rows.shape[-1]
        step = gguf_quants.rows_per_chunk(length)
        for begin in range(0, len(rows), step):
            end = min(begin + step, len(rows))
            values = gguf_quants.dequantize_rows(raw, tensor.type_name, length, begin, end)
            if layout.offset:
                values = values.astype(np.float32) + np.float32(layout.offset)
            rows[slice(begin, end) if order is None else order[begin:end]] = values

    def release_memory(self) -> None:
        self._file.release_memory()

    def tokenizer(self) -> "Tokenizer":
        if self._tokenizer is None:
            from jaxllm.text.gguf_tokenizer import from_gguf  # here: tokenizers takes time to import

            self._tokenizer = from_gguf(self._file.metadata, str(self.path), self._arch)
        return self._tokenizer

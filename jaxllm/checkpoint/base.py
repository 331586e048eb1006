"""What the engine asks of a checkpoint, whatever it is stored in."""

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.errors import CheckpointError

if TYPE_CHECKING:
    from jaxllm.text.tokenizer import Tokenizer


class Checkpoint(abc.ABC):
    """A model's configuration, tensors and tokenizer, in Hugging Face terms.

    Attributes:
      path: the file or directory opened.
      config: the contents of config.json.
      generation_config: the contents of generation_config.json; empty if there is none.
      converted: `jaxllm convert` wrote it: its tensors are the slices of parameters (`Parts.converted`), projections
        lie in the file as [in, out]; nothing has to be transposed. Shapes are given as [out, in] all the same.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    converted: bool = False

    @property
    def directory(self) -> Path:
        """The directory that holds it."""
        return self.path if self.path.is_dir() else self.path.parent

    @abc.abstractmethod
    def names(self) -> Sequence[str]:
        """The tensors' Hugging Face names, in file order."""

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of this name is stored."""
        return name in self.names()

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, [out, in] for a projection. Raises CheckpointError if it is absent."""

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """What `read` gives: the stored dtype, float32 for quantized tensors. Raises CheckpointError if absent."""

    @abc.abstractmethod
    def read(self, name: str, dtype: np.dtype | type | str | None = None) -> np.ndarray:
        """The tensor in `dtype` (default: `self.dtype(name)`).

        The result may be a read-only view of the file: copy it before writing to it.

        Raises:
          CheckpointError: the tensor is absent or its bytes are.
        """

    @abc.abstractmethod
    def read_into(self, name: str, out: np.ndarray, index: tuple[slice, ...] | None = None) -> None:
        """Writes the tensor, or its part `index`, into `out`: of that shape, any dtype, any strides (a slice of a fused
        or transposed array).

        No copy of the whole tensor is made on the way, and no more of the file is read than the part needs.

        Args:
          index: a slice with a start and a stop for each dimension; None: all of it.

        Raises:
          CheckpointError: the tensor is absent, or its shape or that of the part is not `out.shape`.
        """

    @abc.abstractmethod
    def num_bytes(self, name: str) -> int:
        """How many bytes the tensor takes in the file: what a progress bar counts."""

    @abc.abstractmethod
    def release_memory(self) -> None:
        """Lets go of the file's pages that reading has brought in; reading on brings them back."""

    @abc.abstractmethod
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, chat template included, built on the first call.

        Raises:
          CheckpointError: its files are missing or corrupt.
          UnsupportedModelError: it is of a kind that jaxllm does not build.
        """

    def _check_shape(self, name: str, out: np.ndarray, index: tuple[slice, ...] | None = None) -> None:
        shape = self.shape(name)
        if index is not None and len(index) == len(shape):
            shape = tuple(len(range(size)[part]) for part, size in zip(index, shape, strict=True))
        if out.shape != shape:
            part = "" if index is None else f" in its part {index}"
            raise CheckpointError(f"{self.path}: tensor {name!r} has shape {shape}{part}, expected {out.shape}")

"""Numbers out of GGUF metadata, which may hold anything."""

import math
from typing import Any

import numpy as np

from jaxllm.checkpoint.gguf_format import GgufFile
from jaxllm.errors import CheckpointError


class Fields:
    """An architecture's fields in the metadata, checked to be numbers."""

    def __init__(self, file: GgufFile, arch: str):
        self._file, self._arch = file, arch

    def number(self, key: str, default: float | None = None) -> Any:
        """A finite number, or the default; floats by their shortest decimal, as config.json has them.

        Raises:
          CheckpointError: the field is something else.
        """
        value = self._file.metadata.get(f"{self._arch}.{key}")
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{self._file.path}: {self._arch}.{key}={str(value)[:80]}: must be a number")
        # 9.999999747378752e-06 of a float32 field is 1e-05
        return float(str(np.float32(value))) if isinstance(value, float) and abs(value) < 1e38 else value

    def positive(self, key: str, default: float | None = None) -> Any:
        """A number above 0. Raises CheckpointError otherwise, and if it is missing without a default."""
        value = self.number(key, default)
        if value is None or value <= 0:
            raise CheckpointError(f"{self._file.path}: {self._arch}.{key}={value}: must be above 0")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer in [1, 2^31). Raises CheckpointError otherwise, and if it is missing without a default."""
        value = self.positive(key, default)
        if not isinstance(value, int) or value >= 2**31:
            raise CheckpointError(f"{self._file.path}: {self._arch}.{key}={value}: must be an integer below 2^31")
        return value

    def text(self, key: str, default: str) -> str:
        """A string, or the default. Raises CheckpointError if the field is something else."""
        value = self._file.metadata.get(f"{self._arch}.{key}", default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self._file.path}: {self._arch}.{key}={str(value)[:80]}: must be a string")
        return value

"""A checkpoint that is not a file."""

import numpy as np

from jaxllm.errors import CheckpointError


class Memory:
    """A checkpoint of arrays, by name. Reading one of `broken` fails as a truncated file does.

    Attributes:
      read: names in the order in which they were read.
      num_read: elements that were asked for.
    """

    path = "memory"
    converted = False

    def __init__(self, tensors: dict[str, np.ndarray], broken: tuple[str, ...] = ()):
        self.tensors, self.broken = tensors, broken
        self.read: list[str] = []
        self.num_read = 0

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def num_bytes(self, name):
        return self.tensors[name].nbytes

    def read_into(self, name, out, index=None):
        self.read.append(name)
        self.num_read += out.size
        if name in self.broken:
            raise CheckpointError(f"memory: tensor {name!r} is truncated")
        out[...] = self.tensors[name] if index is None else self.tensors[name][index]

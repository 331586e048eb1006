"""The gated half of an MLP: act(x @ gate) * (x @ up)."""

from .api import BACKENDS, gated_matmul, has_kernel
from .reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "BACKENDS", "gated_matmul", "has_kernel"]

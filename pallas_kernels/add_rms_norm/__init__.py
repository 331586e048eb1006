"""Residual sum and root mean square normalization in one pass."""

from .api import BACKENDS, add_rms_norm, has_kernel, product
from .reference import rms_norm

__all__ = ["BACKENDS", "add_rms_norm", "has_kernel", "product", "rms_norm"]

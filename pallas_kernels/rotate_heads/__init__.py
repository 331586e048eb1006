"""Norms of queries and keys and their rotary embedding in one pass."""

from .api import BACKENDS, has_kernel, rotate_heads

__all__ = ["BACKENDS", "has_kernel", "rotate_heads"]

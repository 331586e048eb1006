"""Queries, keys and values of hidden rows, normalized and rotated: the projection and `qk_norm_rope` in one."""

from .api import BACKENDS, has_kernel, qkv_projection

__all__ = ["BACKENDS", "has_kernel", "qkv_projection"]

"""Projection to a vocabulary of which each row's largest entry is all that is wanted."""

from .api import BACKENDS, argmax_projection, has_kernel

__all__ = ["BACKENDS", "argmax_projection", "has_kernel"]

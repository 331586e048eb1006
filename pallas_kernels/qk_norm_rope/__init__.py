"""A fused projection's rows to queries, keys and values: norms of queries and keys, rotary embedding."""

from .api import BACKENDS, has_kernel, qk_norm_rope
from .types import Heads

__all__ = ["BACKENDS", "Heads", "has_kernel", "qk_norm_rope"]

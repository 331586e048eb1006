"""Attention of ragged batches over paged caches, the write of new keys and values included."""

from .api import BACKENDS, cache_shape, ragged_paged_attention
from .types import AttentionMetadata, CacheSpec

__all__ = ["BACKENDS", "AttentionMetadata", "CacheSpec", "cache_shape", "ragged_paged_attention"]

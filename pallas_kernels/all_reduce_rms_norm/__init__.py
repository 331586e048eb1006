"""Sum over tensor-parallel shards, residual sum and root mean square normalization in one pass."""

from .api import BACKENDS, all_reduce_rms_norm, has_kernel, open_memory

__all__ = ["BACKENDS", "all_reduce_rms_norm", "has_kernel", "open_memory"]

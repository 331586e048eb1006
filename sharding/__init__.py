"""Meshes and placement. Depends on JAX alone."""

from .mesh import DATA, TENSOR, make_mesh
from .rules import partition_spec, replicated, sharded_by_rank

__all__ = ["DATA", "TENSOR", "make_mesh", "partition_spec", "replicated", "sharded_by_rank"]

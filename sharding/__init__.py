"""Meshes, placement and collectives. Depends on JAX alone."""

from .collectives import gather_over, max_over, num_shards, shard_start, sum_over
from .mesh import DATA, EXPERT, TENSOR, make_mesh, spans_processes
from .placement import from_parts, place
from .rules import RULES, partition_spec, replicated, sharded_by_rank

__all__ = [
    "DATA",
    "EXPERT",
    "RULES",
    "TENSOR",
    "from_parts",
    "gather_over",
    "make_mesh",
    "max_over",
    "num_shards",
    "partition_spec",
    "place",
    "replicated",
    "shard_start",
    "sharded_by_rank",
    "spans_processes",
    "sum_over",
]

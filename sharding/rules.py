"""Logical axes to mesh axes, in one table."""

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .mesh import DATA, EXPERT, TENSOR

RULES: dict[str | None, str | None] = {
    None: None,
    "embed": None,
    "heads": TENSOR,
    "mlp": TENSOR,
    "vocab": TENSOR,
    "experts": EXPERT,
}


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The PartitionSpec of a parameter with these logical axes; KeyError for an unknown axis."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, PartitionSpec())


def sharded_by_rank(mesh: Mesh) -> NamedSharding:
    """Each data-parallel rank holds its own part of the first axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))

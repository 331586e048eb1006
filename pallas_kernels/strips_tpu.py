"""How TPU kernels of products cut them: blocks of rows, all of their depth, meet the weight one strip at a time."""

import dataclasses
from collections.abc import Iterator

from .ragged_paged_attention.tpu_sizes import LANES

TILE_ROWS = 256  # that are multiplied at once
TILE_DEPTH = 2048  # the most of the depth that they are multiplied with at once


@dataclasses.dataclass(frozen=True)
class Strips:
    """Rows of x that stay in VMEM, columns of a strip, the depth of one product, and the parts that the strips are
    split into, for the cores of a device."""

    rows: int
    columns: int
    depth: int
    parts: int = 1

    def passing(self, depth: int, itemsize: int) -> int:
        """Bytes that the kernel asks of VMEM with x of this depth, beside the rows that stay."""
        raise NotImplementedError

    def vmem(self, depth: int, itemsize: int) -> int:
        """All bytes that it takes up there."""
        return self.rows * depth * itemsize + self.passing(depth, itemsize)


def depth_of_product(depth: int) -> int:
    """The most lanes that divide the depth, up to TILE_DEPTH; `depth` must be whole lanes."""
    return max(part for part in range(LANES, min(depth, TILE_DEPTH) + 1, LANES) if depth % part == 0)


def blocks_of(rows: int) -> Iterator[int]:
    """Rows of a block, in whole tiles that divide `rows`, largest first."""
    tiles = rows // TILE_ROWS
    yield from (rows // blocks for blocks in range(1, tiles + 1) if tiles % blocks == 0)

"""How a step's rows are cut for the TPU kernels. Plain XLA on small int32 arrays; layers that share a page table
compute the same plan from the same metadata, so XLA keeps one copy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .types import AttentionMetadata


class Segments(NamedTuple):
    """Where the rows of several tokens meet aligned blocks of query tokens, in order.

    rows, blocks: int32[N] each, N a bound from shapes alone; total: int32[1], how many are real.
    """

    rows: jax.Array
    blocks: jax.Array
    total: jax.Array


class Writes(NamedTuple):
    """Runs of tiles within a page that get new tokens of the rows of several tokens, cut at multiples of `size`
    positions.

    Attributes:
      pages, tiles: int32[N], the page, and the first tile in it that gets new tokens.
      firsts, lasts: int32[N], the half-open range of positions from that tile on that is new.
      sources: int32[N], the tile of tokens that holds the first of them.
      shifts: int32[N], where a position's token stands from that tile on, less the position; may be negative.
      total: int32[1], how many are real.
    """

    pages: jax.Array
    tiles: jax.Array
    firsts: jax.Array
    lasts: jax.Array
    sources: jax.Array
    shifts: jax.Array
    total: jax.Array


def _enumerate(counts: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """counts[r] items of each row r, in order: their rows and their indices in the row, int32[most]; and int32[1]."""
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    item = jnp.arange(most, dtype=jnp.int32)
    row = jnp.searchsorted(ends, item, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, counts.shape[0] - 1)
    return row, item - (ends[row] - counts[row]), ends[-1:]


def _is_longer(metadata: AttentionMetadata) -> jax.Array:
    rows = jnp.arange(metadata.kv_lens.shape[0], dtype=jnp.int32)
    is_longer = (rows >= metadata.num_decodes) & (rows < metadata.num_rows)
    return is_longer & (metadata.query_starts[1:] > metadata.query_starts[:-1])


def segments(metadata: AttentionMetadata, block: int) -> Segments:
    """Cuts the rows from num_decodes on at multiples of `block` tokens."""
    tokens, num_rows = metadata.positions.shape[0], metadata.kv_lens.shape[0]
    starts, ends = metadata.query_starts[:-1], metadata.query_starts[1:]
    first = starts // block
    counts = jnp.where(_is_longer(metadata), (ends - 1) // block - first + 1, 0)
    rows, index, count = _enumerate(counts, -(-tokens // block) + min(num_rows, tokens))
    return Segments(rows, first[rows] + index, count)


def writes(metadata: AttentionMetadata, size: int, page_size: int, tile: int) -> Writes:
    """Cuts the new positions of the rows from num_decodes on at multiples of `size`, which divides page_size."""
    tokens, num_rows = metadata.positions.shape[0], metadata.kv_lens.shape[0]
    lengths = metadata.query_starts[1:] - metadata.query_starts[:-1]
    ends = metadata.kv_lens
    starts = ends - lengths
    run = starts // size
    counts = jnp.where(_is_longer(metadata), (ends - 1) // size - run + 1, 0)
    rows, index, count = _enumerate(counts, -(-tokens // size) + 2 * min(num_rows, tokens))
    base = (run[rows] + index) * size
    begin = jnp.maximum(starts[rows], base)  # the first new position
    end = jnp.minimum(ends[rows], base + size)
    base = begin // tile * tile
    width = metadata.page_tables.shape[1]
    pages = metadata.page_tables[rows, jnp.minimum(base // page_size, width - 1)]
    token = metadata.query_starts[rows] + begin - starts[rows]
    firsts = begin - base
    return Writes(pages, base % page_size // tile, firsts, end - base, token // tile, token % tile - firsts, count)

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
    """Aligned runs of `size` positions within a page that get new tokens of the rows of several tokens.

    Attributes:
      pages, parts: int32[N], the page, and which run in it.
      old_pages, old_parts: int32[N], the run whose old content is to be read: that run itself where it is only partly
        new, else that of the entry before, which costs no copy.
      sources: int32[N], the block of `size` tokens that holds the token at the run's first position; may be -1.
      shifts: int32[N], where in that block it stands.
      firsts, lasts: int32[N], the half-open range of the run's positions that is new.
      total: int32[1], how many are real.
    """

    pages: jax.Array
    parts: jax.Array
    old_pages: jax.Array
    old_parts: jax.Array
    sources: jax.Array
    shifts: jax.Array
    firsts: jax.Array
    lasts: jax.Array
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


def writes(metadata: AttentionMetadata, size: int, page_size: int) -> Writes:
    """Cuts the new positions of the rows from num_decodes on at multiples of `size`, which divides page_size."""
    tokens, num_rows = metadata.positions.shape[0], metadata.kv_lens.shape[0]
    lengths = metadata.query_starts[1:] - metadata.query_starts[:-1]
    ends = metadata.kv_lens
    starts = ends - lengths
    run = starts // size
    counts = jnp.where(_is_longer(metadata), (ends - 1) // size - run + 1, 0)
    rows, index, count = _enumerate(counts, -(-tokens // size) + 2 * min(num_rows, tokens))
    base = (run[rows] + index) * size  # the run's first position
    width = metadata.page_tables.shape[1]
    real = jnp.arange(rows.shape[0], dtype=jnp.int32) < count
    pages = metadata.page_tables[rows, jnp.minimum(base // page_size, width - 1)]
    pages = jnp.where(real, pages, 0)
    parts = jnp.where(real, base % page_size // size, 0)
    firsts, lasts = jnp.maximum(starts[rows] - base, 0), jnp.minimum(ends[rows] - base, size)
    firsts, lasts = jnp.where(real, firsts, 0), jnp.where(real, lasts, 0)
    token = metadata.query_starts[rows] + base - starts[rows]
    partial = lasts - firsts < size
    old = jax.lax.cummax(jnp.where(partial, jnp.arange(rows.shape[0], dtype=jnp.int32), 0))
    return Writes(pages, parts, pages[old], parts[old], token // size, token % size, firsts, lasts, count)

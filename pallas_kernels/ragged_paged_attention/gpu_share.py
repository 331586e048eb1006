"""Finds the decode rows whose page tables begin alike, so that their common keys are read once for all of them.

Plain XLA on small int32 arrays, once a step. Everything is dense (rows x rows) comparisons, which fuse into a few
kernels, where sorts and scans would be many.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .types import AttentionMetadata

LEAST_TILES = 8  # reads of a tile that a run must save, or its parts cost more than they bring


class SharedRuns(NamedTuple):
    """Runs of rows that share their first tiles of keys. S is the number of rows, padding included.

    Attributes:
      order: int32[S], the rows, those that share pages beside each other.
      start: int32[ceil(S / 2)], where in `order` each run begins.
      rows: like start: how many rows the run has; 0: there is no such run.
      tiles: like start: how many tiles they share.
      run: int32[S], the run of each row, or -1.
      place: int32[S], the row's place in its run.
    """

    order: jax.Array
    start: jax.Array
    rows: jax.Array
    tiles: jax.Array
    run: jax.Array
    place: jax.Array


def shared_runs(metadata: AttentionMetadata, page_size: int, tile: int, most: int) -> SharedRuns:
    """Runs of at most `most` decode rows. Only pages before the one of a row's newest key count as shared."""
    tables = metadata.page_tables
    count, pages = tables.shape
    row = jnp.arange(count, dtype=jnp.int32)
    decoding = row < metadata.num_decodes
    complete = jnp.where(decoding, jnp.maximum(metadata.kv_lens - 1, 0) // page_size, 0)

    # Sort by the pages at a few depths; rows that share a prefix share those within it.
    before, equal = jnp.zeros((count, count), bool), jnp.ones((count, count), bool)
    for depth in (0, *(2**i - 1 for i in range(1, pages.bit_length()) if 2**i - 1 < pages)):
        key = jnp.where(depth < complete, tables[:, depth], jnp.int32(2**31 - 1))
        before |= equal & (key[:, None] < key[None, :])
        equal &= key[:, None] == key[None, :]
    before |= equal & (row[:, None] < row[None, :])
    rank = jnp.sum(before, axis=0, dtype=jnp.int32)
    order = jnp.sum(jnp.where(rank[:, None] == row[None, :], row[:, None], 0), axis=0, dtype=jnp.int32)

    sorted_tables, complete = tables[order], complete[order]
    differs = sorted_tables[1:] != sorted_tables[:-1]
    common = jnp.min(jnp.where(differs, jnp.arange(pages, dtype=jnp.int32), pages), axis=1)
    common = jnp.minimum(common, jnp.minimum(complete[1:], complete[:-1])) * page_size // tile
    link = jnp.concatenate([jnp.zeros(1, jnp.int32), common])  # tiles that each row shares with the one before it
    left, right = jnp.concatenate([jnp.zeros(1, jnp.int32), link[:-1]]), jnp.append(link[1:], jnp.int32(0))
    linked = (link > 0) & (2 * link >= jnp.maximum(left, right))  # a weak link must not shorten a strong run

    first = jnp.max(jnp.where(~linked[None, :] & (row[None, :] <= row[:, None]), row[None, :], 0), axis=1)
    place = (row - first) % most
    start = row - place
    follows = (start[None, :] == row[:, None]) & (place[None, :] > 0)
    rows = 1 + jnp.sum(follows, axis=1, dtype=jnp.int32)
    tiles = jnp.min(jnp.where(follows, link[None, :], jnp.int32(2**30)), axis=1)
    worth = (rows > 1) & ((rows - 1) * tiles >= LEAST_TILES)
    run = jnp.where(worth[start], start // 2, -1)

    # Two runs begin at least two rows apart, so a run may be named by half its start.
    even = 2 * jnp.arange((count + 1) // 2, dtype=jnp.int32)
    odd = jnp.minimum(even + 1, count - 1)
    at = jnp.where(worth[odd], odd, even)
    chosen = worth[at]
    rows, tiles = jnp.where(chosen, rows[at], 0), jnp.where(chosen, tiles[at], 0)
    return SharedRuns(order, at, rows, tiles, run[rank], place[rank])

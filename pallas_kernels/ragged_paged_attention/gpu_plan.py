"""How a step's attention is cut into pieces for the multiprocessors. Plain XLA on small int32 arrays, once a step.

Every layer that shares a page table and a window computes the same plan from the same metadata: `jit` traces it once,
and XLA keeps one copy.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .gpu_share import shared_runs
from .types import AttentionMetadata

# Columns of DecodePlan.items
FIRST, END, ROW, RUN, PLACE, BEGIN, TILES, NEXT = range(8)
# What a pair costs a stream beside its tiles, in tiles: its queries are fetched, its newest key is put in, its result
# is written. A row's last tile, part of one, costs as much as others. Fitted to what an H200 took at other costs, such
# as 124 us for 256 ragged rows of 384 keys on average with pairs at nothing, 116 with pairs at 80 keys and tiles at
# theirs (docs/performance.md); not timed itself.
PAIR_COST = 1


class DecodePlan(NamedTuple):
    """All decode work as a list of (item, key-value head, tile) triples, cut into one run a stream.

    An item is a row's own keys, or the keys that a run of rows share (`gpu_share`). The runs' items come first, V - S
    of them; then those of the S rows. A pair is item * num_kv_heads + head.

    Attributes:
      streams: int32[streams, 4], first pair, tile in that pair, number of tiles, number of pairs touched.
      items: int32[V, 8]: FIRST tile; END of the keys; ROW whose page table holds them; RUN, for a row's item its run
        plus one (0: none), for a run's item its number of rows; PLACE, for a row's item its place in the run, for a
        run's item where in `order` its rows stand; BEGIN, the cost of all that stands before; number of TILES a head;
        the NEXT item that has any.
      order: int32[S], rows.
      counts: int32[3], a stream's share of the cost, decode rows, real tokens.
    """

    streams: Any  # arrays outside of kernels, Refs inside
    items: Any
    order: Any
    counts: Any


def streams_of(item_begin, tiles, head, length):
    """(first, last) stream that has tiles of a pair."""
    begin = item_begin + head * (tiles + PAIR_COST)
    return lax.div(begin, length), lax.div(begin + tiles - 1, length)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), static_argnames=("page_size", "shared_rows"))
def decode_plan(
    metadata: AttentionMetadata,
    num_kv_heads: int,
    streams: int,
    tile: int,
    window: int | None,
    *,
    page_size: int = 1,
    shared_rows: int = 0,
) -> DecodePlan:
    """Cuts the decode work into `streams` runs of equal cost. A tile belongs to the stream in which its cost begins.

    Args:
      tile: keys a tile.
      shared_rows: the most rows that may share a read of common keys, whose pages are of `page_size`; 0: none do.
    """
    size = metadata.kv_lens.shape[0]
    row = jnp.arange(size, dtype=jnp.int32)
    zero = jnp.zeros_like(row)
    end = jnp.where(row < metadata.num_decodes, metadata.kv_lens, 0)
    first = zero if window is None else jnp.maximum(end - window, 0) // tile
    if shared_rows:
        runs = shared_runs(metadata, page_size, tile, shared_rows)
        order = runs.order
        first = jnp.where(runs.run >= 0, runs.tiles[runs.run], first)
        common = (0 * runs.start, runs.tiles * tile, order[runs.start], runs.rows, runs.start)
        own = (first, end, row, runs.run + 1, runs.place)
        fields = [jnp.concatenate(pair) for pair in zip(common, own)]
    else:
        # The rows as they are. XLA makes an iota anew for each layer's kernel, 0.9 microseconds each, but not this.
        order = jnp.where(end >= 0, row, 0)
        fields = [first, end, row, zero, zero]
    tiles = (fields[END] + tile - 1) // tile - fields[FIRST]
    ends = jnp.cumsum(tiles * num_kv_heads, dtype=jnp.int32)
    begin = ends - tiles * num_kv_heads
    item = jnp.arange(tiles.shape[0], dtype=jnp.int32)
    pair_cost = jnp.where(tiles > 0, tiles + PAIR_COST, 0)
    cost_ends = jnp.cumsum(pair_cost * num_kv_heads, dtype=jnp.int32)
    cost_begin = cost_ends - pair_cost * num_kv_heads
    follows = (item[None, :] > item[:, None]) & (tiles[None, :] > 0)
    following = jnp.min(jnp.where(follows, item[None, :], item[-1]), axis=1)
    items = jnp.stack([*fields, cost_begin, tiles, following], axis=1)

    length = jnp.maximum((cost_ends[-1] + streams - 1) // streams, 1)
    reached = jnp.minimum(jnp.arange(streams + 1, dtype=jnp.int32) * length, cost_ends[-1])
    at = jnp.sum(cost_ends[None, :] <= reached[:, None], axis=1, dtype=jnp.int32)
    at = jnp.minimum(at, ends.shape[0] - 1)
    inside, each = reached - cost_begin[at], jnp.maximum(pair_cost[at], 1)
    begins = begin[at] + inside // each * tiles[at] + jnp.minimum(inside % each, tiles[at])

    def locate(position):
        item = jnp.sum(ends[None, :] <= position[:, None], axis=1, dtype=jnp.int32)
        item = jnp.minimum(item, ends.shape[0] - 1)
        inside = position - begin[item]
        per_head = jnp.maximum(tiles[item], 1)
        head = jnp.minimum(inside // per_head, num_kv_heads - 1)  # streams without work point past the end
        return item * num_kv_heads + head, inside % per_head

    pair, offset = locate(begins[:-1])
    last_pair, _ = locate(begins[1:] - 1)
    count = begins[1:] - begins[:-1]
    # Items without tiles may lie between two pairs; streams step over them and do not count them.
    filled = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(tiles > 0, dtype=jnp.int32)])
    first_number, last_number = (filled[p // num_kv_heads] * num_kv_heads + p % num_kv_heads for p in (pair, last_pair))
    segments = jnp.where(count > 0, last_number - first_number + 1, 0)
    return DecodePlan(
        jnp.stack([pair, offset, count, segments], axis=1),
        items,
        order,
        jnp.stack([length, metadata.num_decodes, metadata.query_starts[metadata.num_rows]]),
    )


@functools.partial(jax.jit, static_argnums=1)
def prefill_plan(metadata: AttentionMetadata, block: int) -> tuple[jax.Array, jax.Array]:
    """Cuts the query tokens of the rows that are no decode rows into blocks of at most `block`, costliest first.

    Returns:
      plan: int32[N, 4], first token, number of tokens, position of the first token, row; N depends on shapes alone.
      totals: int32[2], how many entries of plan are real, and how many tokens are not padding.
    """
    num_rows, tokens = metadata.kv_lens.shape[0], metadata.positions.shape[0]
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    lengths = metadata.query_starts[1:] - metadata.query_starts[:-1]
    blocks = jnp.where((rows >= metadata.num_decodes) & (rows < metadata.num_rows), (lengths + block - 1) // block, 0)
    ends = jnp.cumsum(blocks, dtype=jnp.int32)
    most = min(tokens, tokens // block + num_rows)
    index = jnp.arange(most, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None, :] <= index[:, None], axis=1, dtype=jnp.int32), num_rows - 1)
    offset = (index - (ends[row] - blocks[row])) * block
    count = jnp.clip(lengths[row] - offset, 0, block)
    position = metadata.kv_lens[row] - lengths[row] + offset
    cost = jnp.where(index < ends[-1], position + count, -1)
    plan = jnp.stack([metadata.query_starts[row] + offset, count, position, row], axis=1)
    plan = plan[jnp.argsort(-cost)]
    return plan, jnp.stack([ends[-1], metadata.query_starts[metadata.num_rows]])

"""How a step's attention is cut into pieces for the multiprocessors. Plain XLA on small int32 arrays, once a step.

Every layer that shares a page table and a window computes the same plan from the same metadata, so XLA keeps one copy.
"""

import jax
import jax.numpy as jnp

from .types import AttentionMetadata


def row_tiles(kv_len: jax.Array, tile: int, window: int | None) -> tuple[jax.Array, jax.Array]:
    """(first tile that a decode row of `kv_len` keys sees, number of tiles, at least one); a tile is `tile` keys."""
    first = jnp.zeros_like(kv_len) if window is None else jnp.maximum(kv_len - window, 0) // tile
    return first, jnp.maximum((kv_len + tile - 1) // tile - first, 1)


def decode_plan(
    metadata: AttentionMetadata, num_kv_heads: int, streams: int, tile: int, window: int | None
) -> jax.Array:
    """Cuts all (row, key-value head, tile) triples of the decode rows into `streams` runs of equal length.

    A pair is row * num_kv_heads + head. A pair that is cut leaves several partial results, one a stream; `merge` says
    who they are: the stream that holds a pair's second part merges all of them.

    Returns:
      int32[streams, 5]: first pair, tile in that pair, number of tiles, number of pairs touched, and merge, the number
      of streams from this one on whose first piece continues the pair (0: this stream merges nothing).
    """
    rows = jnp.arange(metadata.kv_lens.shape[0], dtype=jnp.int32)
    _, tiles = row_tiles(metadata.kv_lens, tile, window)
    tiles = jnp.where(rows < metadata.num_decodes, tiles, 0)
    ends = jnp.cumsum(tiles * num_kv_heads, dtype=jnp.int32)
    total = ends[-1]
    length = (total + streams - 1) // streams
    begins = jnp.minimum(jnp.arange(streams + 1, dtype=jnp.int32) * length, total)

    def locate(position):
        row = jnp.sum(ends[None, :] <= position[:, None], axis=1, dtype=jnp.int32)
        row = jnp.minimum(row, rows.shape[0] - 1)
        inside = position - (ends[row] - tiles[row] * num_kv_heads)
        size = jnp.maximum(tiles[row], 1)
        return row * num_kv_heads + inside // size, inside % size

    pair, offset = locate(begins[:-1])
    last_pair, _ = locate(begins[1:] - 1)
    count = begins[1:] - begins[:-1]
    pairs = jnp.where(count > 0, last_pair - pair + 1, 0)
    continues = (count > 0) & (offset > 0)
    same = continues[None, :] & (pair[None, :] == pair[:, None])
    first_to_continue = continues & (jnp.argmax(same, axis=1) == jnp.arange(streams))
    merge = jnp.where(first_to_continue, jnp.sum(same, axis=1, dtype=jnp.int32), 0)
    return jnp.stack([pair, offset, count, pairs, merge], axis=1)


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

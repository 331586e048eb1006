"""Ragged paged attention in plain XLA, good enough for CPU: loops whose trip counts follow the contexts present.

Rows of one query token (decodes) are taken all at once, page by page; longer rows in blocks of queries, each against
chunks of its own pages. Both keep an online softmax (Milakov and Gimelshein, 2018), so that nothing as wide as a
context is ever held. Everything is computed in float32. XLA fuses the page gather with what reads it where the pages
stand head-major, which is why the layout is [page, key or value, head, token, dim].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import reference
from .types import AttentionMetadata

cache_shape = reference.cache_shape

BLOCK_QUERIES = 128  # queries of one row that are taken together
BLOCK_KEYS = 256  # keys that such a block meets at a time
LOWEST = -1e30  # stands for minus infinity; exp(LOWEST - LOWEST) is a number


class _Softmax(NamedTuple):
    """The running state of an online softmax over [..., queries]: highest score, total weight, weighted values."""

    highest: jax.Array
    total: jax.Array
    out: jax.Array


def _start(shape: tuple[int, ...], head_dim: int, sinks: jax.Array | None) -> _Softmax:
    """`sinks` has to broadcast to `shape`: a sink is a score that brings weight 1 and no value."""
    out = jnp.zeros((*shape, head_dim), jnp.float32)
    if sinks is None:
        return _Softmax(jnp.full(shape, LOWEST, jnp.float32), jnp.zeros(shape, jnp.float32), out)
    return _Softmax(jnp.broadcast_to(sinks.astype(jnp.float32), shape), jnp.ones(shape, jnp.float32), out)


def _accumulate(state: _Softmax, scores, visible, values, *, cap: float | None, equation: str) -> _Softmax:
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(visible, scores, LOWEST)
    highest = jnp.maximum(state.highest, jnp.max(scores, axis=-1))
    weights = jnp.where(visible, jnp.exp(scores - highest[..., None]), 0.0)
    rescale = jnp.exp(state.highest - highest)
    out = state.out * rescale[..., None] + jnp.einsum(equation, weights, values)
    return _Softmax(highest, state.total * rescale + jnp.sum(weights, axis=-1), out)


def _finish(state: _Softmax) -> jax.Array:
    return state.out / jnp.where(state.total == 0.0, 1.0, state.total)[..., None]


def _decode(q, cache, metadata: AttentionMetadata, *, window, cap, sinks) -> jax.Array:
    """One query a row: q [S, K, G, D] to out [S, K, G, D]. Rows from num_decodes on yield anything finite."""
    num_rows, num_kv_heads, group, head_dim = q.shape
    page_size = cache.shape[3]
    is_decode = jnp.arange(num_rows) < metadata.num_decodes
    lengths = jnp.where(is_decode, metadata.kv_lens[:num_rows], 0)
    first = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0)
    first_page = first // page_size
    num_pages = (lengths + page_size - 1) // page_size - first_page

    def body(index, state):
        at = first_page + index
        pages = jnp.take_along_axis(metadata.page_tables[:num_rows], at[:, None], axis=1, mode="clip")[:, 0]
        position = at[:, None] * page_size + jnp.arange(page_size)
        visible = (position < lengths[:, None]) & (position >= first[:, None])
        scores = jnp.einsum("rkgd,rktd->rkgt", q, cache[pages, 0].astype(jnp.float32))
        values = jnp.where(visible[:, None, :, None], cache[pages, 1].astype(jnp.float32), 0.0)
        visible = visible[:, None, None, :]
        return _accumulate(state, scores, visible, values, cap=cap, equation="rkgt,rktd->rkgd")

    start = _start((num_rows, num_kv_heads, group), head_dim, sinks)
    return _finish(lax.fori_loop(0, jnp.max(num_pages), body, start))


def _prefill(q, cache, metadata: AttentionMetadata, *, window, cap, sinks) -> jax.Array:
    """Blocks of queries of the rows from num_decodes on: q [T, K, G, D] to out [T, K, G, D].

    A block may reach past its row's end; what it writes there is overwritten by the next row's blocks, or is padding.
    """
    tokens, num_kv_heads, group, head_dim = q.shape
    page_size = cache.shape[3]
    block = min(tokens, BLOCK_QUERIES)
    pages_per_chunk = max(1, BLOCK_KEYS // page_size)
    chunk = pages_per_chunk * page_size

    num_rows = metadata.kv_lens.shape[0]
    lengths = metadata.query_starts[1:] - metadata.query_starts[:-1]
    lengths = jnp.where(jnp.arange(num_rows) < metadata.num_decodes, 0, lengths)
    blocks_until = jnp.cumsum((lengths + block - 1) // block)
    table_width = metadata.page_tables.shape[1]
    tables = jnp.pad(metadata.page_tables, ((0, 0), (0, pages_per_chunk)))
    queries = jnp.pad(q, ((0, block), (0, 0), (0, 0), (0, 0)))

    def one_block(item, out):
        row = jnp.searchsorted(blocks_until, item, side="right")
        index = item - jnp.where(row > 0, blocks_until[row - 1], 0)
        offset = metadata.query_starts[row] + index * block
        first_position = metadata.kv_lens[row] - lengths[row] + index * block
        positions = first_position + jnp.arange(block)
        last = jnp.minimum(first_position + block, metadata.kv_lens[row])  # keys before this one are needed
        first_key = jnp.int32(0) if window is None else jnp.maximum(first_position - window + 1, 0)
        first_page = first_key // page_size

        part = lax.dynamic_slice_in_dim(queries, offset, block)
        part = part.transpose(1, 2, 0, 3).reshape(num_kv_heads, group * block, head_dim)

        def one_chunk(step, state):
            at = first_page + step * pages_per_chunk
            pages = lax.dynamic_slice(tables, (row, jnp.minimum(at, table_width)), (1, pages_per_chunk))[0]
            key_positions = at * page_size + jnp.arange(chunk)
            known = key_positions < last
            visible = (key_positions[None, :] <= positions[:, None]) & known[None, :]
            if window is not None:
                visible &= key_positions[None, :] > positions[:, None] - window
            keys = cache[pages, 0].transpose(1, 0, 2, 3).reshape(num_kv_heads, chunk, head_dim)
            values = cache[pages, 1].transpose(1, 0, 2, 3).reshape(num_kv_heads, chunk, head_dim)
            scores = jnp.einsum("kqd,ktd->kqt", part, keys.astype(jnp.float32))
            values = jnp.where(known[None, :, None], values.astype(jnp.float32), 0.0)
            visible = jnp.tile(visible, (group, 1))[None]
            return _accumulate(state, scores, visible, values, cap=cap, equation="kqt,ktd->kqd")

        block_sinks = None if sinks is None else jnp.repeat(sinks, block, axis=1)
        state = _start((num_kv_heads, group * block), head_dim, block_sinks)
        num_chunks = (last - first_page * page_size + chunk - 1) // chunk
        state = lax.fori_loop(0, num_chunks, one_chunk, state)
        result = _finish(state).reshape(num_kv_heads, group, block, head_dim).transpose(2, 0, 1, 3)
        return lax.dynamic_update_slice_in_dim(out, result, offset, axis=0)

    out = jnp.zeros(queries.shape, jnp.float32)
    return lax.fori_loop(0, blocks_until[-1], one_block, out)[:tokens]


def ragged_paged_attention(
    q, k, v, cache, metadata: AttentionMetadata, *, scale, window=None, cap=None, sinks=None, k_scale=None, v_scale=None
) -> tuple[jax.Array, jax.Array]:
    """See `api.ragged_paged_attention`."""
    if k_scale is not None:
        k = k / k_scale
        scale = scale * k_scale
    if v_scale is not None:
        v = v / v_scale
    cache = reference.write(cache, k, v, metadata)
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = cache.shape[2]
    queries = (q.astype(jnp.float32) * scale).reshape(tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    grouped = None if sinks is None else sinks.reshape(num_kv_heads, -1)

    num_rows = min(tokens, metadata.kv_lens.shape[0])  # decode rows stand first: row r's query is token r
    out = _decode(queries[:num_rows], cache, metadata, window=window, cap=cap, sinks=grouped)
    if tokens > 1 and not metadata.decodes_only:
        token = jnp.arange(tokens)[:, None, None, None]
        longer = _prefill(queries, cache, metadata, window=window, cap=cap, sinks=grouped)
        decoded = jnp.pad(out, ((0, tokens - num_rows), (0, 0), (0, 0), (0, 0)))
        out = jnp.where(token < metadata.num_decodes, decoded, longer)
    out = out.reshape(tokens, num_heads, head_dim)
    if v_scale is not None:
        out = out * v_scale
    padding = jnp.arange(tokens) >= metadata.query_starts[metadata.num_rows]
    return jnp.where(padding[:, None, None], 0.0, out).astype(q.dtype), cache

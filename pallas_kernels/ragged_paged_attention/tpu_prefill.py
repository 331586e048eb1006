"""Rows of several query tokens on TPU, after their keys and values are written.

Query tokens are cut into aligned blocks, each head's [group * tokens, lanes] one tall operand. A grid step is a
segment: one row's part of one block (`tpu_plan.segments`). Segments of a block follow each other and share its softmax
state; what is not the segment's own is masked. Keys and values come in blocks of pages through two buffers, the next
block while one is computed, on into the next segment.

A block is as many tokens as VMEM has room for, up to all of the step's: keys and values are read once for each. Within
it they meet the queries by chunks, whose size is that of a good product (see `tpu_sizes`). Keys that all queries of a
full chunk see whole skip the masks. Of a segment that is short, or sees few of the keys, only some parts of a chunk are
computed, each with the keys that its queries see: all of a block, or a half or quarter of it, 128 at least.

Bytes: a row's keys and values are read once for each of its blocks of queries, of those up to the block's end, in whole
tiles.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..mosaic_tpu import keep_in_vmem, result
from .tpu_common import LOG2E, LOWEST, cdiv, dot, dot_transposed, fold, keep_in_hbm, to_log2, widen
from .tpu_copies import copy_pages
from .tpu_plan import segments
from .tpu_sizes import LANES, PrefillSizes, part_tokens, spans
from .types import AttentionMetadata

NOTHING = -(2**30)  # a last key that stands for none


def _body(
    rows,
    blocks,
    count,
    query_starts,
    kv_lens,
    scale,
    table,
    next_table,
    q,
    sinks,
    cache,
    out,
    buffers,
    highest,
    total,
    acc,
    state,
    sems,
    *,
    sizes: PrefillSizes,
    window: int | None,
    cap: float | None,
):
    part, segment = pl.program_id(0), pl.program_id(1)
    page_size = cache.shape[2]
    _, heads, keys, cache_lanes = buffers.shape
    group, lanes = q.shape[0] // heads, q.shape[2]
    tokens, chunk = sizes.tokens, sizes.chunk
    tile = 32 // buffers.dtype.itemsize
    part_size = part_tokens(chunk, group)
    widths = spans(keys)
    widths_of_parts = widths if part_size < chunk else widths[:-1]
    pages_per_block = keys // page_size
    my_heads = pl.ds(part * heads, heads)
    last_segment = pl.num_programs(1) - 1

    def reach(index):
        """Of a segment: tokens in the block [low, high), position of token 0 of the block (maybe before the row's
        first), the first page it sees, and keys before its end."""
        row, base = rows[index], blocks[index] * tokens
        end = query_starts[row + 1]
        low = jnp.maximum(query_starts[row] - base, 0)
        high = jnp.minimum(end - base, tokens)
        origin = kv_lens[row] - (end - base)
        first = 0 if window is None else lax.div(jnp.maximum(origin + low - window + 1, 0), page_size)
        return low, high, origin, first, origin + high

    def num_pages(index):
        _, _, _, first, end = reach(index)
        return jnp.where(index < count[0], cdiv(end, page_size) - first, 0)

    def copies(index, block, buffer, act, table=None):
        """Acts on the copies of a block's keys that come before the segment's end."""
        _, _, _, first, end = reach(index)
        first += block * pages_per_block
        held = jnp.where(index < count[0], jnp.clip(end - first * page_size, 0, keys), 0)

        def page(at):
            return 0 if table is None else table[0, first + at]

        copy_pages(act, cache, my_heads, page, held, buffers.at[buffer], sems.at[buffer])

    def fetch(index, block, buffer, table):
        copies(index, block, buffer, lambda copy: copy.start(), table)

    low, high, origin, first, end = reach(segment)
    num_blocks = cdiv(num_pages(segment), pages_per_block)
    before = jnp.maximum(segment - 1, 0)
    after = jnp.minimum(segment + 1, last_segment)

    @pl.when(segment == 0)
    def _first():
        state[0] = 0
        fetch(0, 0, 0, table)

    @pl.when((segment == 0) | (blocks[before] != blocks[segment]))
    def _reset():
        highest[...] = jnp.full_like(highest, LOWEST)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def clear_from(buffer, at):
        """Zeros in the buffer from key `at` to the end of the least span with it: what stands there belongs to
        others."""
        base = pl.multiple_of(lax.div(at, tile) * tile, tile)

        @pl.when(base < at)
        def _partly():
            old = buffers[buffer, :, pl.ds(base, tile), :].astype(jnp.float32)
            index = lax.broadcasted_iota(jnp.int32, old.shape, 1)
            buffers[buffer, :, pl.ds(base, tile), :] = jnp.where(index < at - base, old, 0.0).astype(buffers.dtype)

        span = jnp.int32(keys)
        for width in reversed(widths):
            span = jnp.where(at <= width, width, span)

        @pl.loop(cdiv(at, tile), lax.div(span, tile))
        def _wholly(index):
            place = pl.ds(pl.multiple_of(index * tile, tile), tile)
            buffers[buffer, :, place, :] = jnp.zeros((heads, tile, cache_lanes), buffers.dtype)

    def attend(head, buffer, at, width: int, span: int, last_seen):
        """Lets `width` queries a head, from `at` of the block on, meet the first `span` keys of the buffer.
        last_seen: int32[group * width, LANES], the last key of the buffer that each sees, in all lanes; None where each
        sees all."""
        mine = pl.ds(at, width)

        def flat(x):
            return x.reshape(group * width, x.shape[2])

        def put(ref, x):
            ref[head, :, mine, :] = x.reshape(group, width, x.shape[1])

        queries = flat(q[pl.ds(head * group, group), mine, :])
        head_keys = buffers[buffer, head, :span, :lanes].astype(queries.dtype)
        values = buffers[buffer, head, :span, cache_lanes - lanes :].astype(queries.dtype)
        scores = to_log2(dot_transposed(queries, head_keys), scale[0], cap)
        if last_seen is not None:
            key = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            limit = widen(last_seen, span)
            visible = key <= limit
            if window is not None:
                visible &= key > limit - window
            scores = jnp.where(visible, scores, LOWEST)
        old = flat(highest[head, :, mine, :])
        new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
        # Where a query has seen no key yet, masked keys weigh 1; the first that it sees scales that to nothing.
        weights = jnp.exp2(scores - widen(new, span))
        rescale = jnp.exp2(old - new)
        put(total, flat(total[head, :, mine, :]) * rescale + fold(weights))
        put(highest, new)
        before = flat(acc[head, :, mine, :])
        after = before * widen(rescale, lanes) + dot(weights.astype(queries.dtype), values)
        if last_seen is not None:
            # Values that are not numbers must not reach another row's queries: zero times NaN is NaN.
            after = jnp.where(widen(last_seen, lanes) > NOTHING, after, before)
        put(acc, after)

    def seen_from(at, width: int, first_key):
        token = at + (lax.broadcasted_iota(jnp.int32, (group * width, LANES), 0) & (width - 1))
        return jnp.where((token >= low) & (token < high), token + (origin - first_key), NOTHING)

    def attend_whole(buffer, base, last_seen):
        @pl.loop(0, heads)
        def _head(head):
            attend(head, buffer, base, chunk, keys, last_seen)

    def keys_seen(queries_end, first_key):
        """How many keys of a block the segment's queries before `queries_end` see, or more than it has."""
        return jnp.minimum(queries_end, high) + origin - first_key

    def attend_parts(buffer, base, first_key, first_part, parts_end):
        @pl.loop(first_part, parts_end)
        def _part(index):
            at = pl.multiple_of(base + index * part_size, part_size)
            last_seen = seen_from(at, part_size, first_key)
            seen = jnp.minimum(keys_seen(at + part_size, first_key), keys)

            for narrower, span in zip((0, *widths), widths_of_parts):

                @pl.when((seen > narrower) & (seen <= span))
                def _span(span=span):
                    @pl.loop(0, heads)
                    def _head(head):
                        attend(head, buffer, at, part_size, span, last_seen)

    @pl.loop(0, num_blocks)
    def _block(block):
        buffer = state[0]
        is_last = block == num_blocks - 1

        @pl.when(is_last & (segment < last_segment))
        def _fetch_of_next_segment():
            fetch(after, 0, 1 - buffer, next_table)

        @pl.when(jnp.logical_not(is_last))
        def _fetch_of_this_segment():
            fetch(segment, block + 1, 1 - buffer, table)

        copies(segment, block, buffer, lambda copy: copy.wait())
        first_key = (first + block * pages_per_block) * page_size

        @pl.when(first_key + keys > end)
        def _clear():
            clear_from(buffer, end - first_key)

        # The tokens of which one sees a key, then those of a chunk.
        from_token, to_token = jnp.maximum(low, first_key - origin), high
        if window is not None:
            to_token = jnp.minimum(high, first_key + keys - 1 + window - origin)

        @pl.loop(lax.div(from_token, chunk), cdiv(to_token, chunk))
        def _chunk(index):
            base = pl.multiple_of(index * chunk, chunk)
            all_seen = (low <= base) & (high >= base + chunk) & (first_key + keys <= origin + base + 1)
            if window is not None:
                all_seen &= first_key >= origin + base + chunk - window
            # The parts in which a query of the segment sees a key; all of them in one go where these are many, and
            # keys, too.
            first_part = lax.div(jnp.maximum(from_token - base, 0), part_size)
            parts_end = cdiv(jnp.minimum(to_token - base, chunk), part_size)
            few = (part_size < chunk) & (2 * (parts_end - first_part) * part_size <= chunk)
            few |= (len(widths) > 1) & (2 * keys_seen(base + chunk, first_key) <= keys)

            @pl.when(all_seen)
            def _whole_without_masks():
                attend_whole(buffer, base, None)

            if widths_of_parts:

                @pl.when(few)
                def _parts():
                    attend_parts(buffer, base, first_key, first_part, parts_end)

            @pl.when(jnp.logical_not(all_seen | few))
            def _whole():
                attend_whole(buffer, base, seen_from(base, chunk, first_key))

        state[0] = 1 - buffer

    @pl.when((segment == last_segment) | (blocks[after] != blocks[segment]))
    def _finish():
        @pl.loop(0, heads * (tokens // chunk))
        def _rows(step):
            head = lax.div(step, tokens // chunk)
            mine = pl.ds(pl.multiple_of(lax.rem(step, tokens // chunk) * chunk, chunk), chunk)
            weight = jnp.sum(total[head, :, mine, :].reshape(group * chunk, LANES), axis=1, keepdims=True)
            if sinks is not None:
                sink = sinks[pl.ds(head * group, group)] * LOG2E  # [group, 1, LANES]
                sink = jnp.broadcast_to(sink, (group, chunk, LANES)).reshape(group * chunk, LANES)
                weight = weight + jnp.exp2(sink[:, :1] - highest[head, :, mine, :].reshape(group * chunk, LANES)[:, :1])
            weight = jnp.where(weight == 0.0, 1.0, weight)
            attended = (acc[head, :, mine, :].reshape(group * chunk, lanes) / weight).astype(out.dtype)
            for index in range(group):
                at = pl.ds(pl.multiple_of((head * group + index) * lanes, lanes), lanes)
                out[mine, at] = attended[index * chunk : (index + 1) * chunk]


def prefill(
    q: jax.Array,
    cache: jax.Array,
    metadata: AttentionMetadata,
    scale: jax.Array,
    *,
    sizes: PrefillSizes,
    window: int | None,
    cap: float | None,
    sinks: jax.Array | None,
    vmem_limit_bytes: int,
    stay_bytes: int,
    interpret,
) -> jax.Array:
    """Serves the rows from num_decodes on.

    Args:
      q: [num_heads, T, lanes].
      cache: [num_pages, num_kv_heads, page_size, cache lanes], this step's keys and values in it.
      scale: float32[1].
      sinks: float32[num_heads] or None.
      stay_bytes: the most that queries may take up in VMEM before the call, and outputs behind it.

    Returns:
      out [T, num_heads * lanes], as the projection that follows takes it; tokens of other rows and padding hold
      anything.
    """
    num_heads, num_tokens, lanes = q.shape
    _, num_kv_heads, page_size, cache_lanes = cache.shape
    heads, q_heads = num_kv_heads // sizes.parts, num_heads // sizes.parts
    group, tokens = num_heads // num_kv_heads, sizes.tokens
    q = jnp.pad(q, ((0, 0), (0, -num_tokens % tokens), (0, 0)))
    plan = segments(metadata, tokens)
    last = plan.rows.shape[0] - 1
    tables = metadata.page_tables[:, None, :]

    q_spec = pl.BlockSpec((q_heads, tokens, lanes), lambda part, segment, rows, blocks, *_: (part, blocks[segment], 0))
    out_spec = pl.BlockSpec((tokens, q_heads * lanes), lambda part, segment, rows, blocks, *_: (blocks[segment], part))

    def table_spec(offset):
        return pl.BlockSpec(
            (None, *tables.shape[1:]),
            lambda part, segment, rows, *_: (rows[jnp.minimum(segment + offset, last)], 0, 0),
            memory_space=pltpu.SMEM,
        )

    in_specs, operands = (
        [table_spec(0), table_spec(1), q_spec],
        [tables, tables, keep_in_vmem(q, stay_bytes, interpret)],
    )
    body = functools.partial(_body, sizes=sizes, window=window, cap=cap)
    if sinks is None:
        body = functools.partial(_without_sinks, body)
    else:
        in_specs.append(pl.BlockSpec((q_heads, 1, LANES), lambda part, *_: (part, 0, 0)))
        operands.append(jnp.broadcast_to(sinks.astype(jnp.float32)[:, None, None], (num_heads, 1, LANES)))
    in_specs.append(pl.BlockSpec(memory_space=pltpu.HBM))
    operands.append(keep_in_hbm(cache, interpret))
    scalars = (*plan, metadata.query_starts, metadata.kv_lens, scale)
    out = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(sizes.parts, jnp.maximum(plan.total[0], 1)),
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[
                pltpu.VMEM((2, heads, sizes.keys, cache_lanes), cache.dtype),
                pltpu.VMEM((heads, group, tokens, LANES), jnp.float32),
                pltpu.VMEM((heads, group, tokens, LANES), jnp.float32),
                pltpu.VMEM((heads, group, tokens, lanes), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=result((q.shape[1], num_heads * lanes), q.dtype, stay_bytes, interpret),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes
        ),
        interpret=interpret,
        name="ragged_paged_prefill",
    )(*scalars, *operands)
    return out[:num_tokens]


def _without_sinks(body, *refs):
    """`body` takes its sinks as the tenth argument."""
    return body(*refs[:9], None, *refs[9:])

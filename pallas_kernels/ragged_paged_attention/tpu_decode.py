"""Rows of one query token on TPU: their new keys and values are written, and they attend, in one pass over their pages.

A grid step takes a few rows; within it, and on into the next, blocks of a row's pages stream through a ring of VMEM
buffers, a page in one copy, of the last one a few of its tiles, all heads in each. The ring knows nothing of rows:
while one row is computed, the pages of rows further on are on their way.

Heads are taken in bundles whose query heads fill registers (8 of them): a bundle's keys [heads * keys, lanes] meet its
queries [query heads, lanes] in one product, and scores of a query with another head's keys are masked. A product a head
would leave most of each register empty where groups are small. Bundles do not depend on each other, so that one's
products run beside another's exponentials.

Queries, new keys and values come heads first, in blocks of whole tiles of tokens, as the rotation leaves them and the
kernels of longer rows take them, and the output goes where the projection behind takes it, tokens first. A row's heads
are gathered from and scattered to float32 copies of the block by strided loads and stores, so that no array is
transposed in HBM.

The new token's key and value are put into the row's last block where it lies in VMEM, and go to the cache from a
buffer of their own, while other rows are computed: with the token beside them in bfloat16, whose elements share words
with theirs.

Bytes: every page of a row is read once, of the last one only the tiles (8 tokens in bfloat16) that hold earlier tokens,
and two tokens are written. The minimum is kv_len - 1 tokens read and one written. With 1000 tokens that is 1.001 times
the minimum read, and 0.2% of it written.
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
from .tpu_sizes import LANES, DecodeSizes, bundle_heads, word_tokens
from .types import AttentionMetadata

WRITES = 4  # tiles of which new tokens are on their way to the cache
# What the copies know, in SMEM: the next block to fetch, its buffer, and the buffer to compute on.
NEXT_ROW, NEXT_BLOCK, NEXT_BUFFER, BUFFER = range(4)


def _of_token(wide, token, tokens: int, heads: int, first: int = 0):
    """Of a block [lanes / 128, all heads * tokens, 128]: [heads, lanes] of one token, from head `first` on."""
    place = pl.ds(first * tokens + token, heads, stride=tokens)
    return jnp.concatenate([wide[index, place, :] for index in range(wide.shape[0])], axis=1)


def _body(
    num_decodes,
    kv_lens,
    scale,
    tables,
    next_tables,
    q,
    new,
    sinks,
    _cache,
    out,
    cache,
    buffers,
    tiles,
    head_bias,
    q_wide,
    new_wide,
    out_wide,
    state,
    read_sems,
    write_sems,
    *,
    sizes: DecodeSizes,
    window: int | None,
    cap: float | None,
):
    part, step = pl.program_id(0), pl.program_id(1)
    page_size = cache.shape[2]
    _, heads, keys, _ = buffers.shape
    q_heads, tokens, lanes = q.shape
    bundle_rows, bundle_columns = head_bias.shape
    bundle, bundles = bundle_columns // keys, heads * keys // bundle_columns
    tile, copied = tiles.shape[2], word_tokens(tiles.dtype.itemsize)
    pages_per_block = keys // page_size
    my_heads = pl.ds(part * heads, heads)
    count = num_decodes[0]
    step_rows = jnp.minimum(count - step * sizes.rows, sizes.rows)
    first_token = lax.rem(step * sizes.rows, tokens)  # of this step's rows, in the block

    def first_page(row):
        return 0 if window is None else lax.div(jnp.maximum(kv_lens[row] - window, 0), page_size)

    def num_pages(row):
        return cdiv(kv_lens[row], page_size) - first_page(row)

    def page_of(row, index):
        local = row - step * sizes.rows
        here = tables[jnp.minimum(local, sizes.rows - 1), index]
        return jnp.where(local < sizes.rows, here, next_tables[jnp.maximum(local - sizes.rows, 0), index])

    def first_key(row, block):
        return (first_page(row) + block * pages_per_block) * page_size

    def copies(row, block, buffer, act, waits=False):
        """Acts on the copies of a block's keys but the new one, which is in no page yet."""
        held = jnp.clip(kv_lens[row] - 1 - first_key(row, block), 0, keys)
        first = first_page(row) + block * pages_per_block

        def page(index):
            return 0 if waits else page_of(row, first + index)

        copy_pages(act, cache, my_heads, page, held, buffers.at[buffer], read_sems.at[buffer])

    def following(buffer):
        return jnp.where(buffer == sizes.buffers - 1, 0, buffer + 1)

    def fetch_next():
        row, block, buffer = state[NEXT_ROW], state[NEXT_BLOCK], state[NEXT_BUFFER]

        @pl.when(row < count)
        def _row_is_left():
            copies(row, block, buffer, lambda copy: copy.start())
            is_last = (block + 1) * pages_per_block >= num_pages(row)
            state[NEXT_ROW] = jnp.where(is_last, row + 1, row)
            state[NEXT_BLOCK] = jnp.where(is_last, 0, block + 1)
            state[NEXT_BUFFER] = following(buffer)

    def write_back(row, page=0, offset=0):
        """The copy of those tokens of a row's tile that share words with the new one, to `offset` in the page."""
        slot = lax.rem(row, WRITES)
        source, target = (
            pl.ds(pl.multiple_of(at, copied), copied) for at in (lax.rem(jnp.int32(offset), tile), offset)
        )
        place = cache.at[page, my_heads, target, :]
        return pltpu.make_async_copy(tiles.at[slot, :, source, :], place, write_sems.at[slot])

    def put_new(row, local, buffer, at):
        """Puts the new token at key `at` of the buffer, zeros behind it, where nothing is read before it is written,
        and sends it to the cache."""
        slot = lax.rem(row, WRITES)

        @pl.when(row >= WRITES)
        def _wait_for_tile():
            write_back(row).wait()

        base = pl.multiple_of(lax.div(at, tile) * tile, tile)
        old = buffers[buffer, :, pl.ds(base, tile), :].astype(jnp.float32)
        index = lax.broadcasted_iota(jnp.int32, old.shape, 1)
        token = _of_token(new_wide, first_token + local, tokens, heads)[:, None, :]
        merged = jnp.where(index == at - base, token, jnp.where(index < at - base, old, 0.0)).astype(tiles.dtype)
        tiles[slot] = merged
        position = kv_lens[row] - 1
        page = page_of(row, lax.div(position, page_size))
        write_back(row, page, lax.div(lax.rem(position, page_size), copied) * copied).start()
        buffers[buffer, :, pl.ds(base, tile), :] = merged

        @pl.loop(lax.div(base, tile) + 1, keys // tile)
        def _clear(index):
            place = pl.ds(pl.multiple_of(index * tile, tile), tile)
            buffers[buffer, :, place, :] = jnp.zeros((heads, tile, buffers.shape[3]), buffers.dtype)

    @pl.when(step == 0)
    def _first():
        for index in range(4):
            state[index] = 0
        row = lax.broadcasted_iota(jnp.int32, head_bias.shape, 0)
        head = lax.broadcasted_iota(jnp.int32, head_bias.shape, 1) >> (keys.bit_length() - 1)
        group = q_heads // heads
        own = (row >= head * group) & (row < (head + 1) * group)
        head_bias[...] = jnp.where(own, 0.0, LOWEST)
        for _ in range(sizes.buffers - 1):
            fetch_next()

    @pl.when(first_token == 0)
    def _next_tokens():
        for wide, block in ((q_wide, q), (new_wide, new)):
            flat = block[...].astype(jnp.float32).reshape(block.shape[0] * tokens, block.shape[2])
            for index in range(wide.shape[0]):
                wide[index] = flat[:, index * LANES : (index + 1) * LANES]

    @pl.loop(0, step_rows)
    def _row(local):
        row = step * sizes.rows + local

        def one_block(block, states):
            fetch_next()
            buffer = state[BUFFER]

            copies(row, block, buffer, lambda copy: copy.wait(), waits=True)
            base = first_key(row, block)

            @pl.when((block + 1) * pages_per_block >= num_pages(row))
            def _last_block():
                put_new(row, local, buffer, kv_lens[row] - 1 - base)

            def attend(index, highest, total, acc):
                def flat(lanes_of_part):
                    part = buffers[buffer, pl.ds(index * bundle, bundle), :, lanes_of_part]
                    return part.reshape(bundle_columns, lanes).astype(q.dtype)

                queries = _of_token(q_wide, first_token + local, tokens, bundle_rows, index * bundle_rows).astype(
                    q.dtype
                )
                scores = to_log2(dot_transposed(queries, flat(slice(0, lanes))), scale[0], cap)
                at = lax.broadcasted_iota(jnp.int32, scores.shape, 1) & (keys - 1)
                visible = at < kv_lens[row] - base
                if window is not None:
                    visible &= at >= kv_lens[row] - window - base
                scores = jnp.where(visible, scores + head_bias[...] if bundle > 1 else scores, LOWEST)
                new_highest = jnp.maximum(highest, jnp.max(scores, axis=1, keepdims=True))
                # Zero where masked: each block has a visible key.
                weights = jnp.exp2(scores - widen(new_highest, bundle_columns))
                rescale = jnp.exp2(highest - new_highest)
                total = total * rescale + fold(weights)
                values = flat(slice(buffers.shape[3] - lanes, None))
                acc = acc * widen(rescale, lanes) + dot(weights.astype(q.dtype), values)
                return new_highest, total, acc

            states = tuple(attend(index, *softmax) for index, softmax in enumerate(states))
            state[BUFFER] = following(buffer)
            return states

        start = (
            jnp.full((bundle_rows, LANES), LOWEST, jnp.float32),
            jnp.zeros((bundle_rows, LANES), jnp.float32),
            jnp.zeros((bundle_rows, lanes), jnp.float32),
        )
        states = lax.fori_loop(0, cdiv(num_pages(row), pages_per_block), one_block, (start,) * bundles)
        for index, (highest, total, acc) in enumerate(states):
            total = jnp.sum(total, axis=1, keepdims=True)
            if sinks is not None:
                mine = pl.ds(index * bundle_rows, bundle_rows)
                total = total + jnp.exp2((sinks[mine, :] * LOG2E - highest)[:, :1])
            attended = acc / total
            for tile_index in range(out_wide.shape[0]):
                place = pl.ds(index * bundle_rows * tokens + first_token + local, bundle_rows, stride=tokens)
                out_wide[tile_index, place, :] = attended[:, tile_index * LANES : (tile_index + 1) * LANES]

    for head in range(q_heads):
        for index in range(out_wide.shape[0]):
            first_lane = head * lanes + index * LANES
            out[:, first_lane : first_lane + LANES] = out_wide[index, pl.ds(head * tokens, tokens), :].astype(out.dtype)

    @pl.when(step == pl.num_programs(1) - 1)
    def _drain():
        for slot in range(WRITES):

            @pl.when(slot < count)
            def _wait_for_tile():
                write_back(slot).wait()


def decode(
    q: jax.Array,
    new: jax.Array,
    cache: jax.Array,
    metadata: AttentionMetadata,
    scale: jax.Array,
    *,
    sizes: DecodeSizes,
    window: int | None,
    cap: float | None,
    sinks: jax.Array | None,
    vmem_limit_bytes: int,
    stay_bytes: int,
    interpret,
) -> tuple[jax.Array, jax.Array]:
    """Serves the leading num_decodes rows.

    Args:
      q: [num_heads, T, lanes]; row r's query token is token r.
      new: [num_kv_heads, T, cache lanes], new keys and values, in the cache's dtype.
      cache: [num_pages, num_kv_heads, page_size, cache lanes]; updated in place where donated.
      scale: float32[1].
      sinks: float32[num_heads] or None.
      stay_bytes: the most that queries, new keys and values, or the output may take up in VMEM around the call.

    Returns:
      (out [R, num_heads * lanes] of the R tokens that may be such rows, of which those from num_decodes on hold
      anything; cache).
    """
    num_heads, num_tokens, lanes = q.shape
    num_rows = min(num_tokens, metadata.kv_lens.shape[0])
    _, num_kv_heads, page_size, cache_lanes = cache.shape
    parts = sizes.parts
    heads, q_heads = num_kv_heads // parts, num_heads // parts
    group = num_heads // num_kv_heads
    bundle = bundle_heads(heads, group)
    steps = -(-num_rows // sizes.rows)
    pad = steps * sizes.rows - num_rows

    tokens = max(block_tokens(q.dtype), block_tokens(new.dtype))
    q, new = (jnp.pad(x, ((0, 0), (0, -num_tokens % tokens), (0, 0))) for x in (q, new))
    tables = jnp.pad(metadata.page_tables[:num_rows], ((0, pad), (0, 0))).reshape(steps, sizes.rows, -1)
    count = jnp.minimum(metadata.num_decodes, num_rows)
    last = steps - 1

    def heads_spec(count, width):
        return pl.BlockSpec((count, tokens, width), lambda part, step, *_: (part, step * sizes.rows // tokens, 0))

    def tables_spec(offset):
        return pl.BlockSpec(
            (None, *tables.shape[1:]),
            lambda part, step, *_: (jnp.minimum(step + offset, last), 0, 0),
            memory_space=pltpu.SMEM,
        )

    in_specs = [tables_spec(0), tables_spec(1), heads_spec(q_heads, lanes), heads_spec(heads, cache_lanes)]
    operands = [tables, tables, q, new]
    operands[2:] = [keep_in_vmem(x, stay_bytes, interpret) for x in operands[2:]]
    body = functools.partial(_body, sizes=sizes, window=window, cap=cap)
    if sinks is None:
        body = functools.partial(_without_sinks, body)
    else:
        in_specs.append(pl.BlockSpec((None, q_heads, LANES), lambda part, step, *_: (part, 0, 0)))
        operands.append(jnp.broadcast_to(sinks.astype(jnp.float32).reshape(parts, q_heads, 1), (parts, q_heads, LANES)))
    in_specs.append(pl.BlockSpec(memory_space=pltpu.HBM))
    operands.append(keep_in_hbm(cache, interpret))
    scalars = (count[None], metadata.kv_lens[:num_rows], scale)
    out, cache = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(parts, jnp.maximum(cdiv(count, sizes.rows), 1)),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((tokens, q_heads * lanes), lambda part, step, *_: (step * sizes.rows // tokens, part)),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            scratch_shapes=[
                pltpu.VMEM((sizes.buffers, heads, sizes.keys, cache_lanes), cache.dtype),
                pltpu.VMEM((WRITES, heads, block_tokens(cache.dtype), cache_lanes), cache.dtype),
                pltpu.VMEM((bundle * group, bundle * sizes.keys), jnp.float32),
                pltpu.VMEM((lanes // LANES, q_heads * tokens, LANES), jnp.float32),
                pltpu.VMEM((cache_lanes // LANES, heads * tokens, LANES), jnp.float32),
                pltpu.VMEM((lanes // LANES, q_heads * tokens, LANES), jnp.float32),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.SemaphoreType.DMA((sizes.buffers,)),
                pltpu.SemaphoreType.DMA((WRITES,)),
            ],
        ),
        out_shape=[
            result((-(-num_rows // tokens) * tokens, num_heads * lanes), q.dtype, stay_bytes, interpret),
            pltpu.HBM(cache.shape, cache.dtype),
        ],
        input_output_aliases={len(scalars) + len(operands) - 1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="ragged_paged_decode",
    )(*scalars, *operands)
    return out[:num_rows], cache


def block_tokens(dtype) -> int:
    """Tokens of a tile."""
    return 32 // jnp.dtype(dtype).itemsize


def _without_sinks(body, *refs):
    """`body` takes its sinks as the ninth argument."""
    return body(*refs[:7], None, *refs[7:])

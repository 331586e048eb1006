"""Decode attention on Hopper: one query token a row, split over the keys so that every multiprocessor reads as much.

Each consumer warpgroup owns a stream, an equal run of (row, head, tile) triples (`gpu_plan.decode_plan`); one producer
warpgroup keeps the streams' rings of key and value tiles full by TMA. The query heads of one key-value head are the
first rows of a wgmma tile of 64. A pair that several streams share leaves partial results, which `merge` joins.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .gpu_common import LOG2E, NO_MAXIMUM, PER_ROW, ROWS, WGMMA, clear_rows, find_pages, rows_of, soft_cap, tiled
from .gpu_merge import Parts, part_rows
from .gpu_plan import decode_plan, row_tiles
from .types import AttentionMetadata


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Tile sizes of the decode kernel.

    Attributes:
      tile: keys a tile, a multiple of 64.
      slots: tiles (of keys or of values) that each stream's ring holds, at least 2.
      consumers: warpgroups a multiprocessor that compute, each on a stream of its own.
      blocks: blocks in the grid: one a multiprocessor.
    """

    tile: int = 64
    slots: int = 4
    consumers: int = 2
    blocks: int = 132


def weighted_sum(weights: jax.Array, values_ref, interpret) -> jax.Array:
    """weights @ values with the weights in registers, which the interpreter's wgmma does not take."""
    if interpret:
        product = jnp.dot(weights.astype(jnp.float32), values_ref[...].astype(jnp.float32))
        plgpu.commit_smem()  # unlike wgmma, this read is one that a later TMA copy must be fenced from
        return product

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, weights, values_ref)
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((weights.shape[0], values_ref.shape[1]), jnp.float32))


def _decode_body(
    plan_ref,
    kv_lens_ref,
    table_ref,
    scales_ref,
    sinks_ref,
    q_ref,
    cache_ref,
    *refs,
    config: DecodeConfig,
    group: int,
    window: int | None,
    cap: float | None,
    interpret,
):
    out_ref, part_ref, lse_ref = refs[:3]
    q_stage, q_smem, staging, ring, q_ready, filled, emptied = refs[3:]
    num_kv_heads, head_dim = cache_ref.shape[2], cache_ref.shape[5]
    tile, slots, consumers = config.tile, config.slots, config.consumers
    columns, half = min(head_dim, 128), min(head_dim, 128) // 2  # of an accumulator and of a stored part
    worker = lax.axis_index("wg")
    block = lax.axis_index("block")

    def tiles_of(pair):
        row = lax.div(pair, num_kv_heads)
        kv_len = kv_lens_ref[row]
        first, tiles = row_tiles(kv_len, tile, window)
        return row, kv_len, first, tiles

    @pl.when(worker == consumers)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")
        streams = [block * consumers + i for i in range(consumers)]
        counts = [plan_ref[stream, 2] for stream in streams]

        def step(index, cursors):
            following = []
            for i in range(consumers):
                pair, offset = cursors[2 * i : 2 * i + 2]
                row, _, first, tiles = tiles_of(pair)
                key = (first + offset) * tile
                head = lax.rem(pair, num_kv_heads)

                @pl.when(index < counts[i])
                def _fill():
                    start_copies = find_pages(cache_ref, table_ref, row, key, tile, head)
                    for part in range(2):
                        slot = i * slots + lax.rem(2 * index + part, slots)

                        @pl.when(2 * index + part >= slots)
                        def _wait():
                            plgpu.barrier_wait(emptied.at[slot])

                        start_copies(part, ring.at[slot], filled.at[slot])

                ended = offset + 1 >= tiles
                more = index + 1 < counts[i]
                following += [jnp.where(ended & more, pair + 1, pair), jnp.where(ended, 0, offset + 1)]
            return tuple(following)

        cursors = []
        for stream in streams:
            cursors += [plan_ref[stream, 0], plan_ref[stream, 1]]
        lax.fori_loop(0, functools.reduce(jnp.maximum, counts), step, tuple(cursors))
        for i in range(consumers):
            for slot in range(slots):
                pl.when(2 * counts[i] > slot)(functools.partial(plgpu.barrier_wait, emptied.at[i * slots + slot]))

    @pl.when(worker < consumers)
    def _consume():
        plgpu.set_max_registers(232 if consumers <= 2 else 152, action="increase")
        stream = block * consumers + worker
        q_tile = q_smem.at[worker]
        out_tile, part_tile = (ref.at[worker] for ref in staging)
        scale, value_scale = scales_ref[0], scales_ref[1]

        copied = q_stage.shape[1]
        q_layout = plgpu.Layout.SMEM_GMEM_COPY((copied, head_dim), q_ref.dtype, 128)

        def start_query(pair):
            target = q_stage.at[worker, pl.ds(0, group)]
            plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(pair * group, group)], target, q_ready.at[worker])

        def segment(index, carry):
            pair, offset, left, done, kv_len = carry
            first, tiles = row_tiles(kv_len, tile, window)
            here = jnp.minimum(tiles - offset, left)
            out_row = pair * group
            # What the next segment needs is on its way while this one computes.
            next_row = jnp.minimum(lax.div(pair + 1, num_kv_heads), kv_lens_ref.shape[0] - 1)
            next_kv_len = kv_lens_ref[next_row]

            # TMA cannot put rows that start anywhere into wgmma's layout, so they take a way through registers.
            plgpu.barrier_wait(q_ready.at[worker])
            q_tile[pl.ds(0, copied)] = plgpu.load(q_stage.at[worker], layout=q_layout, optimized=False)
            plgpu.commit_smem()
            pl.when(index + 1 < segments)(lambda: start_query(pair + 1))

            def attend(index, state):
                accs, highest, total = state
                count = done + index
                key_slot = worker * slots + lax.rem(2 * count, slots)
                value_slot = worker * slots + lax.rem(2 * count + 1, slots)
                low = (first + offset + index) * tile

                plgpu.barrier_wait(filled.at[key_slot])

                def multiply_keys(acc_ref):
                    plgpu.wgmma(acc_ref, q_tile, ring.at[key_slot].transpose((1, 0)))
                    return acc_ref[...]

                scores = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, tile), jnp.float32))
                plgpu.barrier_arrive(emptied.at[key_slot])

                key = plgpu.broadcasted_iota(jnp.int32, (ROWS, tile), 1, layout=WGMMA) + low
                visible = key < kv_len
                if window is not None:
                    visible &= key >= kv_len - window
                scores = scores * scale
                if cap is not None:
                    scores = soft_cap(scores, cap)
                scores = jnp.where(visible, scores * LOG2E, -jnp.inf)
                new_highest = jnp.maximum(highest, scores.max(axis=1))
                alpha = jnp.exp2(highest - new_highest)
                weights = jnp.exp2(scores - rows_of(new_highest, scores.shape))
                total = total * alpha + weights.sum(axis=1)
                weights = weights.astype(q_ref.dtype)

                plgpu.barrier_wait(filled.at[value_slot])
                partial = low + tile > kv_len
                if window is not None:
                    partial |= low < kv_len - window

                @pl.when(partial)
                def _clear():
                    clear_rows(ring.at[value_slot], 0 if window is None else kv_len - window - low, kv_len - low)

                accs = list(accs)
                for i in range(len(accs)):
                    values = ring.at[value_slot, :, pl.ds(i * columns, columns)]
                    product = weighted_sum(weights, values, interpret)
                    accs[i] = accs[i] * rows_of(alpha, accs[i].shape) + product
                plgpu.barrier_arrive(emptied.at[value_slot])
                return tuple(accs), new_highest, total

            accs = (plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), WGMMA),) * (head_dim // columns)
            if sinks_ref is None:
                highest = plgpu.layout_cast(jnp.full((ROWS,), NO_MAXIMUM, jnp.float32), PER_ROW)
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW)
            else:  # the piece with the first tile counts the sink
                sink_start = lax.rem(out_row, num_kv_heads * group)
                sink = plgpu.load(sinks_ref.at[pl.ds(sink_start, ROWS)], layout=PER_ROW, optimized=False)
                highest = jnp.maximum(sink * LOG2E + jnp.where(offset == 0, 0.0, 2 * NO_MAXIMUM), NO_MAXIMUM)
                ones = plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), PER_ROW)
                total = ones * jnp.where(offset == 0, 1.0, 0.0)
            accs, highest, total = lax.fori_loop(0, here, attend, (accs, highest, total))

            inverse = jnp.where(total > 0.0, value_scale / total, 0.0)
            accs = [acc * rows_of(inverse, acc.shape) for acc in accs]
            rows = pl.ds(0, group)
            whole = (offset == 0) & (here == tiles)

            @pl.when(whole)
            def _finish():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for i, acc in enumerate(accs):
                    out_tile[:, pl.ds(i * columns, columns)] = acc.astype(out_ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_tile.at[rows], out_ref.at[pl.ds(out_row, group)])

            @pl.when(jnp.logical_not(whole))
            def _leave_part():
                which = jnp.where(offset == 0, 1, 0)
                lse = jnp.where(total > 0.0, highest + jnp.log2(total), NO_MAXIMUM)

                def leave(value, target_ref, starts):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    part_tile[...] = value
                    plgpu.commit_smem()
                    for start in starts:
                        target = target_ref.at[stream, which, pl.ds(0, group), pl.ds(start, half)]
                        plgpu.copy_smem_to_gmem(part_tile.at[rows], target)

                leave(rows_of(lse, (ROWS, half)), lse_ref, range(0, head_dim, half))
                for start in range(0, head_dim, half):
                    inside = start % columns
                    leave(accs[start // columns][:, inside : inside + half], part_ref, (start,))

            ended = offset + here >= tiles
            return (
                jnp.where(ended, pair + 1, pair),
                jnp.int32(0),
                left - here,
                done + here,
                jnp.where(ended, next_kv_len, kv_len),
            )

        pair = plan_ref[stream, 0]
        segments = plan_ref[stream, 3]
        pl.when(segments > 0)(lambda: start_query(pair))
        row = jnp.minimum(lax.div(pair, num_kv_heads), kv_lens_ref.shape[0] - 1)
        start = (pair, plan_ref[stream, 1], plan_ref[stream, 2], jnp.int32(0), kv_lens_ref[row])
        lax.fori_loop(0, segments, segment, start)
        plgpu.wait_smem_to_gmem(0)


def decode(
    q: jax.Array,
    cache: jax.Array,
    metadata: AttentionMetadata,
    scales: jax.Array,
    *,
    group: int,
    window: int | None,
    cap: float | None,
    sinks: jax.Array | None,
    config: DecodeConfig,
    interpret=False,
) -> tuple[jax.Array, Parts]:
    """Attention of the decode rows, but for the pairs that several streams share.

    Args:
      q: [T * num_heads, head_dim]; row r's token is token r.
      cache: [num_pages, 2, num_kv_heads, page_size, head_dim].
      group: query heads a key-value head.
      scales: float32[2], what the scores and what the output are multiplied by.

    Returns:
      out, [T * num_heads, head_dim], of which only decode rows' results are written, and the parts still to `merge`.
    """
    num_kv_heads, head_dim = cache.shape[2], cache.shape[4]
    streams = config.blocks * config.consumers
    plan = decode_plan(metadata, num_kv_heads, streams, config.tile, window)
    part_type = jax.ShapeDtypeStruct((streams, 2, part_rows(group, head_dim), head_dim), jnp.float32)
    out_types = (jax.ShapeDtypeStruct(q.shape, q.dtype), part_type, part_type)
    ring = config.consumers * config.slots
    q_copied = max(8 * pl.cdiv(group, 8), 8 * 256 // head_dim)  # rows: four warps copy at least a (8, 64) tile each
    keys = min(cache.shape[3], config.tile)  # a copy
    pages = cache.reshape(*cache.shape[:3], cache.shape[3] // keys, keys, head_dim)
    staging = (
        plgpu.SMEM((config.consumers, ROWS, head_dim), q.dtype),
        plgpu.SMEM((config.consumers, ROWS, min(head_dim, 128) // 2), jnp.float32),
    )
    scratch = (
        plgpu.SMEM((config.consumers, q_copied, head_dim), q.dtype),
        tiled((config.consumers, ROWS, head_dim), q.dtype),
        staging if interpret else plgpu.RefUnion(*staging),  # the interpreter takes two warpgroups' parts for one
        tiled((ring, config.tile, head_dim), cache.dtype),
        plgpu.Barrier(num_barriers=config.consumers),
        plgpu.Barrier(num_barriers=ring, num_arrivals=config.tile // keys),
        plgpu.Barrier(num_barriers=ring),
    )
    operands = [plan, metadata.kv_lens, metadata.page_tables, scales]
    if sinks is not None:  # row i of a q tile may belong to any head onwards
        operands.append(jnp.tile(sinks.astype(jnp.float32), 1 + pl.cdiv(ROWS, sinks.shape[0])))

    def body(*refs):
        known = refs[:5] if sinks is not None else (*refs[:4], None)
        _decode_body(
            *known, *refs[len(operands) :], config=config, group=group, window=window, cap=cap, interpret=interpret
        )

    out, part, lse = plgpu.kernel(
        body,
        out_type=out_types,
        scratch_types=scratch,
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=config.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        interpret=interpret,
        kernel_name="ragged_paged_decode",
    )(*operands, q, pages)
    return out, Parts(plan, part, lse)

"""What the warpgroups of the decode kernel do: one fills rings with tiles of keys and values, the others compute.

See `gpu_decode`. A segment is what a stream has of a pair: all of its tiles, or those up to where the next stream
begins or from where the one before ends.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .gpu_common import (
    LOG2E,
    NO_MAXIMUM,
    PER_ROW,
    ROWS,
    WGMMA,
    clear_rows,
    copy_tile,
    find_pages,
    rows_of,
    soft_cap,
)  # fmt: skip
from .gpu_merge import Parts
from .gpu_plan import END, FIRST, NEXT, PLACE, ROW, RUN, TILES, DecodePlan
from .gpu_prefetch import prefetch


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Tile sizes of the decode kernel.

    Attributes:
      tile: keys a tile, a multiple of 64.
      slots: tiles (of keys or of values) that each stream's ring holds, at least 2.
      consumers: warpgroups a multiprocessor that compute, 1 or 2, each on a stream of its own.
      grain: a row's keys are read up to a multiple of it, at least 16.
      share_from: padded rows from which on rows that begin alike read their common keys together.
      blocks: blocks in the grid: one a multiprocessor.
    """

    tile: int = 64
    slots: int = 4
    consumers: int = 2
    grain: int = 16
    share_from: int = 8
    blocks: int = 132

    @property
    def streams(self) -> int:
        return self.blocks * self.consumers


class Inputs(NamedTuple):
    """Refs in global memory."""

    plan: DecodePlan
    tables: Any
    scales: Any
    qkv: Any  # [T, num_heads + 2 * num_kv_heads, head_dim]
    cache: Any  # [num_pages, 2, num_kv_heads, copies a page, keys a copy, head_dim]
    sinks: Any = None
    new_slots: Any = None  # int32[T], where this step's keys and values go, if they are not in the cache yet
    then: Any = None  # the weight of the product that follows, if it is to be prefetched


class Outputs(NamedTuple):
    """Refs in global memory; see `gpu_decode.decode`."""

    out: Any
    own: Parts
    shared: Parts | None


class Scratch(NamedTuple):
    """Refs in shared memory, each consumer's along the first axis; ring and its barriers have all streams' slots."""

    q_stage: Any  # [rows, head_dim], a pair's queries as TMA brings them
    q_tile: Any  # [64, head_dim], tiled for wgmma
    out_tile: Any  # [64, head_dim], a result on its way out; the queries of a run on their way in
    part_tile: Any  # float32[64, at most 64 columns], a partial result on its way out
    lse_tile: Any  # float32[64]
    new_rows: Any  # [2, head_dim], the newest key and value
    ring: Any  # [slots, tile, head_dim], tiles of keys and of values in turn
    q_ready: Any  # barriers: q_stage is there,
    run_ready: Any  # the queries of a run,
    new_ready: Any  # new_rows,
    filled: Any  # a slot of the ring;
    emptied: Any  # it has been read


def weighted_sum(acc: jax.Array, weights: jax.Array, values_ref, interpret) -> jax.Array:
    """acc + weights @ values with the weights in registers, which the interpreter's wgmma does not take."""
    if interpret:
        product = jnp.dot(weights.astype(jnp.float32), values_ref[...].astype(jnp.float32))
        plgpu.commit_smem()  # unlike wgmma, this read is one that a later TMA copy must be fenced from
        return acc + product

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, weights, values_ref)

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def produce(ins: Inputs, scratch: Scratch, config: DecodeConfig, splits: int):
    """Fills the rings of the block's streams, a tile of each in turn."""
    items, tile, slots = ins.plan.items, config.tile, config.slots
    num_kv_heads = ins.cache.shape[2] * splits
    streams = [i * config.blocks + lax.axis_index("block") for i in range(config.consumers)]
    counts = [ins.plan.streams[stream, 2] for stream in streams]

    def aim(pair, offset):
        """All that it takes to copy a tile; found a tile ahead, so that nothing waits for these loads."""
        item = lax.div(pair, num_kv_heads)
        key = (items[item, FIRST] + offset) * tile
        pages = find_pages(ins.cache, ins.tables, items[item, ROW], key, tile)
        return (pair, offset, items[item, TILES], items[item, NEXT], key, items[item, END], *pages)

    def step(index, cursors):
        following = []
        for i, (count, cursor) in enumerate(zip(counts, cursors)):
            pair, offset, tiles, next_item, key, end, *pages = cursor
            head = lax.rem(pair, num_kv_heads)
            cache_head = head if splits == 1 else lax.div(head, splits)
            ended = offset + 1 >= tiles
            next_pair = jnp.where(head + 1 == num_kv_heads, next_item * num_kv_heads, pair + 1)
            following.append(aim(jnp.where(ended, next_pair, pair), jnp.where(ended, 0, offset + 1)))

            @pl.when(index < count)
            def _fill():
                for part in range(2):
                    slot = i * slots + lax.rem(2 * index + part, slots)

                    @pl.when(2 * index + part >= slots)
                    def _wait():
                        plgpu.barrier_wait(scratch.emptied.at[slot])

                    target, filled = scratch.ring.at[slot], scratch.filled.at[slot]
                    copy_tile(ins.cache, pages, key, cache_head, part, target, filled, end, config.grain)

        return tuple(following)

    start = tuple(aim(ins.plan.streams[stream, 0], ins.plan.streams[stream, 1]) for stream in streams)
    lax.fori_loop(0, functools.reduce(jnp.maximum, counts), step, start)
    if ins.then is not None:
        prefetch(ins.then, lax.axis_index("block"), config.blocks)
    for i, count in enumerate(counts):
        for slot in range(slots):
            pl.when(2 * count > slot)(functools.partial(plgpu.barrier_wait, scratch.emptied.at[i * slots + slot]))


def consume(
    ins: Inputs, outs: Outputs, scratch: Scratch,
    *, config: DecodeConfig, group: int, splits: int, shared_rows: int, window: int | None, cap: float | None,
    interpret,
):  # fmt: skip
    """Computes one stream. `scratch` holds this warpgroup's part but for the ring and its barriers."""
    plan, items, tile, slots = ins.plan, ins.plan.items, config.tile, config.slots
    num_kv_heads, head_dim = ins.cache.shape[2] * splits, ins.cache.shape[5]
    columns, half = min(head_dim, 128), min(head_dim, 128) // 2  # of an accumulator and of a stored part
    num_runs = items.shape[0] - plan.order.shape[0]
    worker = lax.axis_index("wg")
    stream = worker * config.blocks + lax.axis_index("block")
    scale, value_scale = ins.scales[0], ins.scales[1]
    factor = LOG2E if cap is not None else scale * LOG2E  # scores are kept as they come: one multiply-add an exponent
    q_stage, q_tile = scratch.q_stage, scratch.q_tile
    q_layout = plgpu.Layout.SMEM_GMEM_COPY(q_stage.shape, q_stage.dtype, 128)
    segments = plan.streams[stream, 3]

    def start_query(pair):
        row_pair = pair - num_runs * num_kv_heads

        def start():
            row, head = lax.div(row_pair, num_kv_heads), lax.rem(row_pair, num_kv_heads)
            source, target = ins.qkv.at[row, pl.ds(head * group, group)], q_stage.at[pl.ds(0, group)]
            plgpu.copy_gmem_to_smem(source, target, scratch.q_ready)

        pl.when(row_pair >= 0)(start) if num_runs else start()

    def gather_queries(item, head):
        """The queries of all rows of a run; where the run is shorter than it may be, the last row's again and again."""
        begin, rows = items[item, PLACE], items[item, RUN]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.loop(0, shared_rows)
        def _(i):
            row = plan.order[begin + jnp.minimum(i, rows - 1)]
            source = ins.qkv.at[row, pl.ds(head * group, group)]
            plgpu.copy_gmem_to_smem(source, scratch.out_tile.at[pl.ds(i * group, group)], scratch.run_ready)

        plgpu.barrier_wait(scratch.run_ready)
        q_tile[...] = plgpu.load(scratch.out_tile, layout=WGMMA, optimized=False)
        plgpu.commit_smem()

    def put_new(slot, head, part: int):
        """Copies this step's key or value of a row into the cache, once the tile it belongs to has been read."""
        copies, keys = ins.cache.shape[3:5]
        page, inside = lax.div(slot, copies * keys), lax.rem(slot, copies * keys)
        target = ins.cache.at[page, part, head, lax.div(inside, keys), lax.rem(inside, keys)]
        plgpu.copy_smem_to_gmem(scratch.new_rows.at[part], target)

    def segment(index, carry):
        pair, offset, left, done, first, end, tiles, mark, next_item = carry
        item, head = lax.div(pair, num_kv_heads), lax.rem(pair, num_kv_heads)
        row = item - num_runs
        is_own = row >= 0 if num_runs else True
        here = jnp.minimum(tiles - offset, left)
        ended = offset + here >= tiles
        # What the next segment needs is on its way while this one computes.
        next_pair = jnp.where(head + 1 == num_kv_heads, next_item * num_kv_heads, pair + 1)
        following = lax.div(next_pair, num_kv_heads)
        ahead = [items[following, field] for field in (FIRST, END, TILES, RUN, NEXT)]

        newest = jnp.int32(-1)  # position of the key that is not in the cache yet
        if (new_slots := ins.new_slots) is not None:
            newest = jnp.where(is_own & ended, end - 1, -1)
            slot = new_slots[jnp.maximum(row, 0)]

            @pl.when(newest >= 0)
            def _fetch_new():
                for part in range(2):
                    source = ins.qkv.at[row, (group + part) * num_kv_heads + head]
                    plgpu.copy_gmem_to_smem(source, scratch.new_rows.at[part], scratch.new_ready)

        @pl.when(is_own)
        def _own_queries():
            # TMA cannot put rows that start anywhere into wgmma's layout, so they take a way through registers.
            plgpu.barrier_wait(scratch.q_ready)
            q_tile[pl.ds(0, q_stage.shape[0])] = plgpu.load(q_stage, layout=q_layout, optimized=False)
            plgpu.commit_smem()

        if num_runs:
            pl.when(jnp.logical_not(is_own))(lambda: gather_queries(item, head))
        pl.when(index + 1 < segments)(lambda: start_query(next_pair))

        def attend(index, state):
            accs, highest, total = state
            count = done + index
            key_slot = worker * slots + lax.rem(2 * count, slots)
            value_slot = worker * slots + lax.rem(2 * count + 1, slots)
            keys, values = scratch.ring.at[key_slot], scratch.ring.at[value_slot]
            low = (first + offset + index) * tile
            is_newest = (newest >= 0) & (newest < low + tile)

            plgpu.barrier_wait(scratch.filled.at[key_slot])
            if new_slots is not None:

                @pl.when(is_newest)
                def _newest_key():
                    plgpu.barrier_wait(scratch.new_ready)
                    clear_rows(keys, 0, tile, newest - low, scratch.new_rows.at[0])
                    put_new(slot, head, 0)

            def multiply_keys(acc_ref):
                plgpu.wgmma(acc_ref, q_tile, keys.transpose((1, 0)))
                return acc_ref[...]

            scores = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, tile), jnp.float32))
            plgpu.barrier_arrive(scratch.emptied.at[key_slot])

            def mask(scores):
                key = plgpu.broadcasted_iota(jnp.int32, (ROWS, tile), 1, layout=WGMMA) + low
                visible = key < end
                if window is not None:
                    visible &= key >= end - window
                return jnp.where(visible, scores, -jnp.inf)

            partial = low + tile > end
            if window is not None:
                partial |= low < end - window
            if cap is not None:
                scores = soft_cap(scores * scale, cap)
            scores = lax.cond(partial, mask, lambda scores: scores, scores)
            new_highest = jnp.maximum(highest, scores.max(axis=1) * factor)
            alpha = jnp.exp2(highest - new_highest)
            weights = jnp.exp2(scores * factor - rows_of(new_highest, scores.shape))
            total = total * alpha + weights.sum(axis=1)
            weights = weights.astype(q_tile.dtype)

            plgpu.barrier_wait(scratch.filled.at[value_slot])

            @pl.when(partial | is_newest)
            def _clear():
                oldest = 0 if window is None else end - window - low
                new_value = None if new_slots is None else scratch.new_rows.at[1]
                # -1 is no row: no other stream's or run's tile takes the new value.
                clear_rows(values, oldest, end - low, jnp.where(is_newest, newest - low, -1), new_value)
                if new_slots is not None:
                    pl.when(is_newest)(lambda: put_new(slot, head, 1))

            accs = list(accs)
            for i in range(len(accs)):
                scaled = accs[i] * rows_of(alpha, accs[i].shape)
                accs[i] = weighted_sum(scaled, weights, values.at[:, pl.ds(i * columns, columns)], interpret)
            plgpu.barrier_arrive(scratch.emptied.at[value_slot])
            return tuple(accs), new_highest, total

        accs = (plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), WGMMA),) * (head_dim // columns)
        if ins.sinks is None:
            highest = plgpu.layout_cast(jnp.full((ROWS,), NO_MAXIMUM, jnp.float32), PER_ROW)
            total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW)
        else:  # the part with the row's own first tile counts the sink
            counted = is_own & (offset == 0)
            sink = plgpu.load(ins.sinks.at[pl.ds(head * group, ROWS)], layout=PER_ROW, optimized=False)
            highest = jnp.maximum(sink * LOG2E + jnp.where(counted, 0.0, 2 * NO_MAXIMUM), NO_MAXIMUM)
            ones = plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), PER_ROW)
            total = ones * jnp.where(counted, 1.0, 0.0)
        accs, highest, total = lax.fori_loop(0, here, attend, (accs, highest, total))

        inverse = jnp.where(total > 0.0, value_scale / total, 0.0)
        accs = [acc * rows_of(inverse, acc.shape) for acc in accs]
        whole = (offset == 0) & (here == tiles)
        final = whole & (mark == 0)  # a run's item has a mark

        @pl.when(final)
        def _finish():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, acc in enumerate(accs):
                scratch.out_tile[:, pl.ds(i * columns, columns)] = acc.astype(outs.out.dtype)
            plgpu.commit_smem()
            target = outs.out.at[pl.ds((pair - num_runs * num_kv_heads) * group, group)]
            plgpu.copy_smem_to_gmem(scratch.out_tile.at[pl.ds(0, group)], target)

        @pl.when(jnp.logical_not(final))
        def _leave_part():
            number = jnp.where(is_own, pair - num_runs * num_kv_heads, pair)
            part = jnp.where(whole, 2 * config.streams + number, 2 * stream + jnp.where(offset == 0, 1, 0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch.lse_tile[...] = jnp.where(total > 0.0, highest + jnp.log2(total), NO_MAXIMUM)
            for start in range(0, head_dim, half):
                inside = start % columns
                if start:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                scratch.part_tile[...] = accs[start // columns][:, inside : inside + half]
                plgpu.commit_smem()

                def leave(parts, rows):
                    source = scratch.part_tile.at[pl.ds(0, rows)]
                    plgpu.copy_smem_to_gmem(source, parts.values.at[part, pl.ds(0, rows), pl.ds(start, half)])
                    if not start:
                        plgpu.copy_smem_to_gmem(scratch.lse_tile, parts.lse.at[part])

                pl.when(is_own)(lambda: leave(outs.own, group))
                if num_runs:
                    pl.when(jnp.logical_not(is_own))(lambda: leave(outs.shared, ROWS))

        now = (first, end, tiles, mark, next_item)
        return (
            jnp.where(ended, next_pair, pair),
            jnp.where(ended, 0, offset + here),
            left - here,
            done + here,
            *(jnp.where(ended, later, field) for later, field in zip(ahead, now)),
        )

    pair = plan.streams[stream, 0]
    pl.when(segments > 0)(lambda: start_query(pair))
    item = lax.div(pair, num_kv_heads)
    fields = [items[item, field] for field in (FIRST, END, TILES, RUN, NEXT)]
    start = (pair, plan.streams[stream, 1], plan.streams[stream, 2], jnp.int32(0), *fields)
    lax.fori_loop(0, segments, segment, start)
    plgpu.wait_smem_to_gmem(0)

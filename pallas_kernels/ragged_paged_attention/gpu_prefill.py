"""Prefill attention on Hopper: rows of several query tokens over paged keys, causal, with wgmma.

Work is a list of items, (block of one row's query tokens, group of query heads that share a key-value head), the most
expensive first, dealt to persistent blocks like cards (`gpu_plan.prefill_plan`). In a block one producer warpgroup
gathers queries and pages by TMA; each consumer warpgroup owns 64 rows (tokens x heads of the group), and two consumers
take turns on the tensor cores: one multiplies while the other computes exponents.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..mosaic import tiled
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
)
from .gpu_plan import prefill_plan
from .types import AttentionMetadata


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Tile sizes of the prefill kernel; a tile is 64 keys for each consumer.

    Attributes:
      consumers: warpgroups that compute, 1 or 2; they share the key and value tiles.
      slots: tiles (of keys or of values) in the ring, at least 2.
      pack: query heads of one group that share a row tile, a power of two that divides the group.
      blocks: persistent blocks: one a multiprocessor.
    """

    consumers: int = 2
    slots: int = 4
    pack: int = 1
    blocks: int = 132

    @property
    def tile(self) -> int:
        return 64 * self.consumers

    @property
    def tokens(self) -> int:
        """Query tokens a consumer."""
        return ROWS // self.pack


def _for_each_item(plan_ref, totals_ref, head_groups: int, blocks: int, body, carry):
    """Deals the items to the blocks, there and back again, so that each block's share costs about the same."""
    block = lax.axis_index("block")
    total = totals_ref[0] * head_groups

    def deal(wave, carry):
        index = wave * blocks + jnp.where(wave % 2 == 0, block, blocks - 1 - block)
        item = lax.div(index, head_groups)
        # Past the end: an item of no keys, which costs nothing.
        there = jnp.where(index < total, item, 0)
        fields = [plan_ref[there, i] for i in range(4)]
        return body(index < total, lax.rem(index, head_groups), *fields, carry)

    return lax.fori_loop(0, pl.cdiv(total, blocks), deal, carry)


def _tile_range(position, count, tile: int, tokens: int, window: int | None):
    """(first, first unmasked, end of unmasked, end) of the tiles of an item of `tokens` tokens from `position`."""
    end = pl.cdiv(position + count, tile)
    if window is None:
        first = unmasked = jnp.int32(0)
    else:
        first = lax.div(jnp.maximum(position - window + 1, 0), tile)
        unmasked = jnp.clip(pl.cdiv(jnp.maximum(position + tokens - window, 0), tile), first, end)
    return first, unmasked, jnp.clip(lax.div(position + 1, tile), unmasked, end), end


def _prefill_body(
    plan_ref, totals_ref, table_ref, scales_ref, sinks_ref, qkv_ref, cache_ref, out_ref,
    q_stage, q_smem, out_stage, ring, q_filled, q_emptied, filled, emptied, turn,
    *, config: PrefillConfig, window: int | None, cap: float | None, interpret,
):  # fmt: skip
    num_tokens, num_heads, head_dim = out_ref.shape
    num_kv_heads = cache_ref.shape[2]
    pack, tokens, tile, slots, consumers = config.pack, config.tokens, config.tile, config.slots, config.consumers
    head_groups = num_heads // pack
    group_blocks = num_heads // num_kv_heads // pack
    worker = lax.axis_index("wg")
    for_each_item = functools.partial(_for_each_item, plan_ref, totals_ref, head_groups, config.blocks)
    tile_range = functools.partial(_tile_range, tile=tile, tokens=consumers * tokens, window=window)

    def token_base(start, consumer):
        """First token of a consumer's rows, held back so that the rows end inside the array."""
        return jnp.minimum(start + consumer * tokens, num_tokens - tokens)

    @pl.when(worker == consumers)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")

        def item(there, head_group, start, count, position, row, carry):
            items, tiles = carry
            head = lax.div(head_group, group_blocks)
            first, _, _, end = tile_range(position, count)

            @pl.when(there)
            def fetch_queries():
                for consumer in range(consumers):
                    pl.when(items > 0)(functools.partial(plgpu.barrier_wait, q_emptied.at[consumer]))
                    for member in range(pack):
                        source = qkv_ref.at[pl.ds(token_base(start, consumer), tokens), head_group * pack + member]
                        target = q_stage.at[consumer, pl.ds(member * tokens, tokens)]
                        plgpu.copy_gmem_to_smem(source, target, q_filled.at[consumer])

            def step(index, tiles):
                pages = find_pages(cache_ref, table_ref, row, index * tile, tile)
                for part in range(2):
                    slot = lax.rem(2 * tiles + part, slots)

                    @pl.when(2 * tiles + part >= slots)
                    def await_slot():
                        plgpu.barrier_wait(emptied.at[slot])

                    copy_tile(cache_ref, pages, index * tile, head, part, ring.at[slot], filled.at[slot])
                return tiles + 1

            tiles = lax.fori_loop(jnp.where(there, first, end), end, step, tiles)
            return items + jnp.where(there, 1, 0), tiles

        items, tiles = for_each_item(item, (jnp.int32(0), jnp.int32(0)))
        for consumer in range(consumers):
            pl.when(items > 0)(functools.partial(plgpu.barrier_wait, q_emptied.at[consumer]))
        for slot in range(slots):
            pl.when(2 * tiles > slot)(functools.partial(plgpu.barrier_wait, emptied.at[slot]))

    @pl.when(worker < consumers)
    def _consume():
        plgpu.set_max_registers(232, action="increase")
        q_tile, stage = q_smem.at[worker], out_stage.at[worker]
        scale, value_scale = scales_ref[0] * (LOG2E if cap is None else 1.0), scales_ref[1]

        def take_turn():
            if consumers == 2:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        def item(there, head_group, start, count, position, row, tiles):
            del row
            first, unmasked, masked, end = tile_range(position, count)
            base = token_base(start, worker)

            @pl.when(there)
            def _():
                plgpu.barrier_wait(q_filled.at[worker])
                q_tile[...] = plgpu.load(q_stage.at[worker], layout=WGMMA, optimized=False)
                plgpu.commit_smem()
                plgpu.barrier_arrive(q_emptied.at[worker])

            def attend(index, state, mask: bool):
                acc, highest, total, tiles = state
                key_slot, value_slot = lax.rem(2 * tiles, slots), lax.rem(2 * tiles + 1, slots)
                low = index * tile
                plgpu.barrier_wait(filled.at[key_slot])
                if mask:
                    # Each consumer clears a share of the values; by the other's next turn it is done.
                    plgpu.barrier_wait(filled.at[value_slot])
                    oldest = 0 if window is None else position - window + 1
                    partial = low + tile > position + count
                    if window is not None:
                        partial |= low < oldest

                    @pl.when(partial)
                    def _():
                        begin = worker * ROWS
                        share = ring.at[value_slot, pl.ds(begin, ROWS)]
                        clear_rows(share, oldest - low - begin, position + count - low - begin)

                def multiply_keys(acc_ref):
                    plgpu.wgmma(acc_ref, q_tile, ring.at[key_slot].transpose((1, 0)))
                    take_turn()
                    return acc_ref[...]

                scores = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, tile), jnp.float32))
                plgpu.barrier_arrive(emptied.at[key_slot])
                if cap is not None:
                    scores = soft_cap(scores * scale, cap) * LOG2E
                if mask:
                    rows = plgpu.broadcasted_iota(jnp.int32, (ROWS, tile), 0, layout=WGMMA)
                    query = (rows & (tokens - 1)) + (position + base - start)
                    key = plgpu.broadcasted_iota(jnp.int32, (ROWS, tile), 1, layout=WGMMA) + low
                    visible = key <= query
                    if window is not None:
                        visible &= key > query - window
                    scores = jnp.where(visible, scores, -jnp.inf)
                factor = scale if cap is None else 1.0
                new_highest = jnp.maximum(highest, scores.max(axis=1) * factor)
                alpha = jnp.exp2(highest - new_highest)
                weights = jnp.exp2(scores * factor - rows_of(new_highest, scores.shape))
                acc = acc * rows_of(alpha, acc.shape)
                total = total * alpha
                small = weights.astype(qkv_ref.dtype)
                total = total + weights.sum(axis=1)
                if not interpret:
                    acc, total, new_highest, small = lax.optimization_barrier((acc, total, new_highest, small))
                if consumers == 2:
                    plgpu.barrier_arrive(turn)
                if not mask:
                    plgpu.barrier_wait(filled.at[value_slot])
                if consumers == 2:
                    plgpu.barrier_wait(turn)
                if interpret:
                    acc = acc + jnp.dot(small.astype(jnp.float32), ring[value_slot].astype(jnp.float32))
                    plgpu.commit_smem()
                else:

                    def multiply_values(acc_ref):
                        plgpu.wgmma(acc_ref, small, ring.at[value_slot])

                    acc = pl.run_state(multiply_values)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(emptied.at[value_slot])
                return acc, new_highest, total, tiles + 1

            acc = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), WGMMA)
            if sinks_ref is None:
                highest = plgpu.layout_cast(jnp.full((ROWS,), NO_MAXIMUM, jnp.float32), PER_ROW)
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW)
            else:
                sink = plgpu.load(sinks_ref.at[pl.ds(head_group * ROWS, ROWS)], layout=PER_ROW, optimized=False)
                highest = jnp.maximum(sink * LOG2E, NO_MAXIMUM)
                total = plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), PER_ROW)
            state = acc, highest, total, tiles
            masked_step, plain_step = (functools.partial(attend, mask=mask) for mask in (True, False))
            first, unmasked, masked = (jnp.where(there, x, end) for x in (first, unmasked, masked))
            if window is not None:
                state = lax.fori_loop(first, unmasked, masked_step, state)
            state = lax.fori_loop(unmasked, masked, plain_step, state)
            acc, highest, total, tiles = lax.fori_loop(masked, end, masked_step, state)

            @pl.when(there)
            def _():
                inverse = jnp.where(total > 0.0, value_scale / total, 0.0)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stage[...] = (acc * rows_of(inverse, acc.shape)).astype(out_ref.dtype)
                plgpu.commit_smem()
                begin = start + worker * tokens
                left = jnp.clip(count - worker * tokens, 0, tokens)
                # A copy's size is static: powers of two make up any number of tokens.
                size = tokens
                while size:

                    @pl.when((left & size) != 0)
                    def _():
                        done = left & ~(2 * size - 1)
                        for member in range(pack):
                            source = stage.at[pl.ds(member * tokens + begin - base + done, size)]
                            target = out_ref.at[pl.ds(begin + done, size), head_group * pack + member]
                            plgpu.copy_smem_to_gmem(source, target)

                    size //= 2

            return tiles

        if consumers == 2:
            pl.when(worker == 1)(take_turn)
        for_each_item(item, jnp.int32(0))
        if consumers == 2:
            pl.when(worker == 0)(take_turn)
        _clear_padding(totals_ref, out_ref, stage, worker, config)
        plgpu.wait_smem_to_gmem(0)


def _clear_padding(totals_ref, out_ref, stage, worker, config: PrefillConfig):
    """Zeroes the output of the padding tokens, one token a turn."""
    num_tokens, num_heads, head_dim = out_ref.shape
    step = config.blocks * config.consumers
    first = totals_ref[1] + lax.axis_index("block") * config.consumers + worker

    @pl.when(first < num_tokens)
    def _():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        stage[...] = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), out_ref.dtype), WGMMA)
        plgpu.commit_smem()

        @pl.loop(first, num_tokens, step=step)
        def _(token):
            for head in range(0, num_heads, ROWS):
                heads = min(ROWS, num_heads - head)
                plgpu.copy_smem_to_gmem(stage.at[pl.ds(0, heads)], out_ref.at[token, pl.ds(head, heads)])


def prefill(
    qkv: jax.Array,
    cache: jax.Array,
    out_ref,
    metadata: AttentionMetadata,
    scales: jax.Array,
    *,
    window: int | None,
    cap: float | None,
    sinks: jax.Array | None,
    config: PrefillConfig,
    interpret=False,
) -> None:
    """Attention of the rows that are no decode rows, and zeros for the padding tokens.

    Args:
      qkv: [T, num_heads + 2 * num_kv_heads, head_dim], queries, keys and values, T at least 64 // config.pack.
      cache: [num_pages, 2, num_kv_heads, page_size, head_dim].
      out_ref: Ref like q, which holds what `decode` wrote.
      scales: float32[2], what the scores and what the output are multiplied by.
    """
    num_heads, head_dim = out_ref.shape[1:]
    consumers, tile = config.consumers, config.tile
    plan, totals = prefill_plan(metadata, consumers * config.tokens)
    keys = min(cache.shape[3], tile)
    pages = cache.reshape(*cache.shape[:3], cache.shape[3] // keys, keys, head_dim)
    rows = (consumers, ROWS, head_dim)
    scratch = (
        plgpu.SMEM(rows, qkv.dtype),
        tiled(rows, qkv.dtype),
        plgpu.SMEM(rows, qkv.dtype),
        tiled((config.slots, tile, head_dim), cache.dtype),
        plgpu.Barrier(num_barriers=consumers, num_arrivals=config.pack),
        plgpu.Barrier(num_barriers=consumers),
        plgpu.Barrier(num_barriers=config.slots, num_arrivals=tile // keys),
        plgpu.Barrier(num_barriers=config.slots, num_arrivals=consumers),
        plgpu.Barrier(num_arrivals=consumers),
    )
    operands = [plan, totals, metadata.page_tables, scales]
    if sinks is not None:  # one value a row of a row tile
        operands.append(jnp.repeat(sinks.astype(jnp.float32), config.tokens))

    def body(*refs):
        known = refs[:5] if sinks is not None else (*refs[:4], None)
        rest = refs[len(operands) :]
        options: dict[str, Any] = {"config": config, "window": window, "cap": cap, "interpret": bool(interpret)}
        _prefill_body(*known, *rest, **options)

    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=scratch,
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        interpret=interpret,
        kernel_name="ragged_paged_prefill",
    )(*operands, qkv, pages, out_ref)

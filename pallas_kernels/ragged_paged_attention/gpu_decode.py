"""Decode attention on Hopper: one query token a row, split over the keys so that every multiprocessor reads as much.

Each consumer warpgroup owns a stream, an equal run of (pair, tile) of the plan (`gpu_plan.decode_plan`); a producer
warpgroup keeps the streams' rings of key and value tiles full by TMA. The query heads of one key-value head are the
first rows of a wgmma tile of 64. Where a run of rows shares its first keys, the queries of all those rows fill the tile
(cascade attention, Ye et al. 2024) and meet the keys once. Pairs that several streams share, and rows of runs, leave
partial results, which `gpu_merge` joins.

A key-value head with too many query heads for that counts as several here, in the plan and in the merge: each has a
group of the query heads and reads the same keys (`splits`).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..mosaic import tiled
from .gpu_common import ROWS
from .gpu_decode_stream import DecodeConfig, Inputs, Outputs, Scratch, consume, produce
from .gpu_merge import Parts, part_rows
from .gpu_plan import DecodePlan, decode_plan
from .types import AttentionMetadata


def decode(
    qkv: jax.Array,
    cache: jax.Array,
    metadata: AttentionMetadata,
    scales: jax.Array,
    *,
    group: int,
    splits: int,
    window: int | None,
    cap: float | None,
    sinks: jax.Array | None,
    config: DecodeConfig,
    new_slots: jax.Array | None = None,
    then: jax.Array | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array, Parts, Parts | None, DecodePlan]:
    """Attention of the decode rows, but for what `gpu_merge.merge` joins.

    Args:
      qkv: [T, num_heads + 2 * num_kv_heads, head_dim], queries, keys and values; row r's token is token r.
      cache: [num_pages, 2, num_kv_heads, page_size, head_dim].
      group: query heads that meet keys together.
      splits: groups a key-value head.
      scales: float32[2], what the scores and what the output are multiplied by.
      new_slots: where this step's keys and values go (see AttentionMetadata.write_slots), if they are not in the cache
        yet; all rows must be decode rows, and `splits` be 1: no group may read what another writes. None: they are
        there.
      then: the weight of the product that follows, to be prefetched (see `gpu_prefetch.is_worth_it`).

    Returns:
      out, [T * num_heads, head_dim], of which only decode rows' results are written; the cache, with what is new; the
      parts of the rows' own keys, and of those that they share, if any may; the plan.
    """
    assert new_slots is None or splits == 1
    num_kv_heads, page_size, head_dim = cache.shape[2] * splits, *cache.shape[3:]
    num_rows, streams, consumers, tile = metadata.kv_lens.shape[0], config.streams, config.consumers, config.tile
    own_rows = part_rows(group, head_dim)
    shared_rows = 0
    if window is None and num_rows >= config.share_from:
        shared_rows = min(32, (ROWS - (own_rows - group)) // group)
        shared_rows = shared_rows if shared_rows > 1 else 0  # a row alone shares nothing
    plan = decode_plan(metadata, num_kv_heads, streams, tile, window, page_size=page_size, shared_rows=shared_rows)
    num_runs = plan.items.shape[0] - num_rows

    def part_types(items, rows):
        count = 2 * streams + items * num_kv_heads
        values = jax.ShapeDtypeStruct((count, rows, head_dim), jnp.float32)
        return Parts(values, jax.ShapeDtypeStruct((count, ROWS), jnp.float32))

    flat = qkv.shape[0] * group * num_kv_heads, head_dim
    out_types = [jax.ShapeDtypeStruct(flat, qkv.dtype), *part_types(num_rows if num_runs else 0, own_rows)]
    if num_runs:
        out_types += part_types(num_runs, ROWS)
    ring = consumers * config.slots
    copied = 8 * 256 // head_dim  # rows at once: four warps copy a (8, 64) tile each
    keys = min(page_size, tile)  # a copy
    staging = (
        plgpu.SMEM((consumers, ROWS, head_dim), qkv.dtype),
        plgpu.SMEM((consumers, ROWS, min(head_dim, 128) // 2), jnp.float32),
    )
    scratch_types = (
        plgpu.SMEM((consumers, copied * pl.cdiv(group, copied), head_dim), qkv.dtype),
        tiled((consumers, ROWS, head_dim), qkv.dtype),
        staging if interpret else plgpu.RefUnion(*staging),  # the interpreter takes two warpgroups' parts for one
        plgpu.SMEM((consumers, ROWS), jnp.float32),
        plgpu.SMEM((consumers, 2, head_dim), cache.dtype),
        tiled((ring, tile, head_dim), cache.dtype),
        plgpu.Barrier(num_barriers=consumers),
        plgpu.Barrier(num_barriers=consumers, num_arrivals=max(shared_rows, 1)),
        plgpu.Barrier(num_barriers=consumers, num_arrivals=2),
        plgpu.Barrier(num_barriers=ring, num_arrivals=tile // keys),
        plgpu.Barrier(num_barriers=ring),
    )
    pages = cache.reshape(*cache.shape[:3], page_size // keys, keys, head_dim)
    cache_ref = None if new_slots is None else jax.new_ref(pages)
    if sinks is not None:  # row i of a q tile may belong to any head onwards
        sinks = jnp.tile(sinks.astype(jnp.float32), 1 + pl.cdiv(ROWS, sinks.shape[0]))
    known = pages if cache_ref is None else cache_ref
    inputs = Inputs(plan, metadata.page_tables, scales, qkv, known, sinks, new_slots, then)
    operands, structure = jax.tree.flatten(inputs)

    def body(*refs):
        ins = jax.tree.unflatten(structure, refs[: len(operands)])
        results, rest = refs[len(operands) :][: len(out_types)], refs[len(operands) + len(out_types) :]
        outs = Outputs(results[0], Parts(*results[1:3]), Parts(*results[3:5]) if num_runs else None)
        scratch = Scratch(*rest[:2], *rest[2], *rest[3:])
        worker = lax.axis_index("wg")

        @pl.when(worker == consumers)
        def _():
            plgpu.set_max_registers(56, action="decrease")
            produce(ins, scratch, config, splits)

        @pl.when(worker < consumers)
        def _():
            plgpu.set_max_registers(224, action="increase")
            mine = {
                name: getattr(scratch, name).at[worker]
                for name in scratch._fields
                if name not in ("ring", "filled", "emptied")
            }
            consume(
                ins, outs, scratch._replace(**mine), config=config, group=group, splits=splits,
                shared_rows=shared_rows, window=window, cap=cap, interpret=interpret,
            )  # fmt: skip

    results = plgpu.kernel(
        body,
        out_type=tuple(out_types),
        scratch_types=scratch_types,
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        interpret=interpret,
        kernel_name="ragged_paged_decode",
    )(*operands)
    if cache_ref is not None:
        cache = jax.freeze(cache_ref).reshape(cache.shape)
    shared = Parts(*results[3:5]) if num_runs else None
    return results[0], cache, Parts(*results[1:3]), shared, plan

"""Writes the new keys and values of the rows of several tokens into their pages, in place.

A tile of the cache holds 8 or 32 positions, and a row's tokens stand at any offset to them. So the kernel takes one
aligned run of positions within a page after another: it fetches the tiles of new tokens that the run overlaps, shifts
them into place in float32 (which is exact), and sends the run's tiles that hold new tokens. Of old content only the
tile is read in which the row's earlier tokens end; behind the row's own end, where nothing is ever read before it is
written, zeros fill the tile.

Runs are fetched two ahead, and have two more to be written.

Bytes: the new keys and values are read and written once, in whole tiles. A run of 64 whose tokens stand at another
offset to tiles than its positions do reads one tile more: an eighth in bfloat16.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tpu_common import cdiv, keep_in_hbm
from .tpu_copies import copy_tiles
from .tpu_plan import writes
from .tpu_sizes import RUN_AHEAD, RUN_SLOTS, Chip, copied_tile, run_tokens, vmem_limit, write_vmem
from .types import AttentionMetadata


def _body(
    pages,
    tiles,
    firsts,
    lasts,
    sources,
    shifts,
    count,
    new,
    _again,
    _cache,
    cache,
    fetched,
    runs,
    read_sems,
    write_sems,
):
    part = pl.program_id(0)
    _, heads, size, _ = runs.shape
    tile = copied_tile(runs.dtype.itemsize)
    most = size // tile
    room = fetched.shape[2]
    my_heads = pl.ds(part * heads, heads)

    def place(first, number: int, multiple: int = 1):
        return pl.ds(pl.multiple_of(first * tile, multiple * tile), number * tile)

    def reads(run, act):
        slot = lax.rem(run, RUN_SLOTS)

        def copy(first, number: int):
            source = new.at[my_heads, place(sources[run] + first, number), :]
            target = fetched.at[slot, :, place(first, number, number), :]
            return pltpu.make_async_copy(source, target, read_sems.at[slot])

        copy_tiles(act, copy, cdiv(shifts[run] + lasts[run], tile), most + 1)

        @pl.when(firsts[run] > 0)
        def _earlier_tokens():
            source = cache.at[pages[run], my_heads, place(tiles[run], 1), :]
            act(pltpu.make_async_copy(source, runs.at[slot, :, pl.ds(0, tile), :], read_sems.at[slot]))

    def writes_of(run, act):
        slot = lax.rem(run, RUN_SLOTS)

        def copy(first, number: int):
            target = cache.at[pages[run], my_heads, place(tiles[run] + first, number), :]
            return pltpu.make_async_copy(runs.at[slot, :, place(first, number, number), :], target, write_sems.at[slot])

        copy_tiles(act, copy, cdiv(lasts[run], tile), most)

    def fetch(run):
        @pl.when(run < count[0])
        def _run_is_left():
            @pl.when(run >= RUN_SLOTS)
            def _slot_is_free():
                writes_of(run - RUN_SLOTS, lambda copy: copy.wait())

            reads(run, lambda copy: copy.start())

    for run in range(RUN_AHEAD):
        fetch(jnp.int32(run))

    @pl.loop(0, count[0])
    def _run(run):
        slot = lax.rem(run, RUN_SLOTS)
        fetch(run + RUN_AHEAD)
        reads(run, lambda copy: copy.wait())

        @pl.loop(0, heads)
        def _head(head):
            tokens = fetched[slot, head].astype(jnp.float32)
            shifted = pltpu.roll(tokens, lax.rem(room - shifts[run], room), axis=0)[:size]
            at = lax.broadcasted_iota(jnp.int32, shifted.shape, 0)
            earlier = jnp.where(at < firsts[run], runs[slot, head].astype(jnp.float32), 0.0)
            is_new = (at >= firsts[run]) & (at < lasts[run])
            runs[slot, head] = jnp.where(is_new, shifted, earlier).astype(runs.dtype)

        writes_of(run, lambda copy: copy.start())

    @pl.loop(jnp.maximum(count[0] - RUN_SLOTS, 0), count[0])
    def _drain(run):
        writes_of(run, lambda copy: copy.wait())


def write(
    cache: jax.Array, new: jax.Array, metadata: AttentionMetadata, *, parts: int, chip: Chip, interpret
) -> jax.Array:
    """Returns `cache` with the new keys and values of the rows from num_decodes on; updated in place where donated.

    Args:
      cache: [num_pages, num_kv_heads, page_size, lanes].
      new: [num_kv_heads, T, lanes] in the cache's dtype.
      parts: what the heads are split into, for the cores of a device.
    """
    _, num_heads, page_size, lanes = cache.shape
    size, tile = run_tokens(page_size), copied_tile(cache.dtype.itemsize)
    heads = num_heads // parts
    new = jnp.pad(new, ((0, 0), (0, -new.shape[1] % tile), (0, 0)))
    scalars = writes(metadata, size, page_size, tile)
    # XLA keeps in VMEM what has more uses: taken twice, new keys and values stay there until decode takes them, too.
    # With one use Qwen3 0.6B on tpu7x sent them to HBM and back in most layers.
    return pl.pallas_call(
        _body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(parts,),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((RUN_SLOTS, heads, size + tile, lanes), cache.dtype),
                pltpu.VMEM((RUN_SLOTS, heads, size, lanes), cache.dtype),
                pltpu.SemaphoreType.DMA((RUN_SLOTS,)),
                pltpu.SemaphoreType.DMA((RUN_SLOTS,)),
            ],
        ),
        out_shape=pltpu.HBM(cache.shape, cache.dtype),
        input_output_aliases={len(scalars) + 2: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            disable_bounds_checks=True,
            vmem_limit_bytes=vmem_limit(chip, write_vmem(heads, size, tile, lanes, cache.dtype.itemsize)),
        ),
        interpret=interpret,
        name="ragged_paged_write",
    )(*scalars, new, new, keep_in_hbm(cache, interpret))

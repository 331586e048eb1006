"""What the decode and the prefill kernel share."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # the M of wgmma
LOG2E = math.log2(math.e)
NO_MAXIMUM = -1e30  # a running maximum before any key: finite, so that differences of it are not NaN
WGMMA, PER_ROW = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


def rows_of(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[M] to [M, N]."""
    return lax.broadcast_in_dim(value, shape, [0])


def find_pages(cache_ref, table_ref, row, first_key, tile: int) -> list[jax.Array]:
    """The page of each copy of one tile; apart from `copy_tile`, so that the latency hides behind the wait for a slot.

    `cache_ref` is [num_pages, 2, num_kv_heads, copies a page, keys a copy, head_dim].
    """
    step = cache_ref.shape[4]
    page_size, pages = cache_ref.shape[3] * step, table_ref.shape[1]
    at = [jnp.minimum(lax.div(first_key + offset, page_size), pages - 1) for offset in range(0, tile, step)]
    same = max(1, page_size // step)  # copies in a row that may stand in one page, the tile being aligned to it
    found: list[jax.Array] = []
    for i, page in enumerate(at):
        found.append(found[-1] if i % same else table_ref[row, page])
    return found


def copy_tile(cache_ref, pages, first_key, head, part: int, slot_ref, barrier, end=None, grain: int = 0):
    """Starts the copies of a tile's keys (part 0) or values (part 1).

    Each arrives on the barrier once, which takes 128 threads' arrivals: hence one copy a page, not many small ones.
    With `end`, keys from there on, rounded up to a multiple of `grain`, are left out.
    """
    step = cache_ref.shape[4]
    for i, page in enumerate(pages):
        key = first_key + i * step
        source = cache_ref.at[page, part, head, lax.rem(lax.div(key, step), cache_ref.shape[3])]

        def copy(size):
            target = slot_ref.at[pl.ds(i * step, size)]
            plgpu.copy_gmem_to_smem(source.at[pl.ds(0, size)] if size < step else source, target, barrier)

        if end is None:
            copy(step)
            continue
        sizes = list(range(min(grain, step), step + 1, min(grain, step)))
        if i:  # a tile's first page always holds a key, the others may not
            pl.when(key >= end)(functools.partial(plgpu.barrier_arrive, barrier))
        for size in sizes:
            wanted = []
            if size < step:
                wanted.append(end - key <= size)
            if size > sizes[0] or i:
                wanted.append(end - key > size - sizes[0])
            run = functools.partial(copy, size)
            pl.when(functools.reduce(jnp.logical_and, wanted))(run) if wanted else run()


def clear_rows(tile_ref, low, high, at=None, new_ref=None):
    """Zeroes the rows of a value tile outside [low, high): zero probability times NaN would still be NaN.

    `new_ref`, a row in SMEM, takes the place of row `at`.
    """
    shape = tile_ref.shape
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
    value = plgpu.load(tile_ref)  # laid out as `row` is
    if new_ref is not None:
        new = plgpu.load(new_ref, layout=WGMMA.reduce(0), optimized=False)
        value = jnp.where(row == at, lax.broadcast_in_dim(new, shape, [1]), value)
    tile_ref[...] = jnp.where((row >= low) & (row < high), value, jnp.zeros_like(value))
    plgpu.commit_smem()


def soft_cap(scores: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(scores / cap), through exp2: the hardware's own tanh is good to 11 bits only."""
    return cap - (2.0 * cap) / (jnp.exp2(scores * (2.0 * LOG2E / cap)) + 1.0)

"""What the decode and the prefill kernel share."""

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


def tiled(shape: tuple[int, ...], dtype):
    """Shared memory in the layout that TMA writes and wgmma reads."""
    swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def rows_of(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[M] to [M, N]."""
    return lax.broadcast_in_dim(value, shape, [0])


def find_pages(cache_ref, table_ref, row, first_key, tile: int, head):
    """Looks up the pages of one tile; returns a function that starts the copies of (part, slot, barrier).

    The look-up is apart so that its latency hides behind the wait for the slot. `cache_ref` is [num_pages, 2,
    num_kv_heads, copies a page, keys a copy, head_dim]; part 0 is keys, part 1 values.
    """
    step = cache_ref.shape[4]
    page_size, pages = cache_ref.shape[3] * step, table_ref.shape[1]
    sources = []
    for offset in range(0, tile, step):
        key = first_key + offset
        page = table_ref[row, jnp.minimum(lax.div(key, page_size), pages - 1)]
        sources.append((offset, page, lax.div(lax.rem(key, page_size), step)))

    def start(part, slot_ref, barrier):
        for offset, page, inside in sources:
            source = cache_ref.at[page, part, head, inside]
            plgpu.copy_gmem_to_smem(source, slot_ref.at[pl.ds(offset, step)], barrier)

    return start


def clear_rows(tile_ref, low, high):
    """Zeroes the rows of a value tile outside [low, high): zero probability times NaN would still be NaN."""
    shape = tile_ref.shape
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
    value = plgpu.load(tile_ref, layout=WGMMA)
    tile_ref[...] = jnp.where((row >= low) & (row < high), value, jnp.zeros_like(value))
    plgpu.commit_smem()


def soft_cap(scores: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(scores / cap), through exp2: the hardware's own tanh is good to 11 bits only."""
    return cap - (2.0 * cap) / (jnp.exp2(scores * (2.0 * LOG2E / cap)) + 1.0)

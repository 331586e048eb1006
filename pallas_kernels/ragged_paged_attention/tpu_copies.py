"""Copies between the cache, where a page is [heads, page_size, lanes], and VMEM: of whole pages, and of the tiles of
others that hold something (`tpu_sizes.copied_tile`)."""

from collections.abc import Callable

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tpu_common import cdiv
from .tpu_sizes import copied_tile, floor_pow2


def copy_pages(act: Callable, cache, heads, page_of: Callable, keys, buffer, sem) -> None:
    """Acts on the copy of each page that the first `keys` keys of a row's block fill, and on those of the tiles of the
    next one that hold some of them.

    Args:
      act: what happens to a copy: that it starts, or is waited for; the latter asks for its size alone.
      cache: [num_pages, all heads, page_size, lanes].
      heads: which of them.
      page_of: an index in the block to the number of a page.
      buffer: [heads, keys of a block, lanes].
    """
    page_size, tile = cache.shape[2], copied_tile(cache.dtype.itemsize)
    tiles_of_page = page_size // tile
    tiles = cdiv(keys, tile)
    full = lax.div(tiles, tiles_of_page)

    @pl.loop(0, full)
    def _page(index):
        place = pl.ds(pl.multiple_of(index * page_size, page_size), page_size)
        act(pltpu.make_async_copy(cache.at[page_of(index), heads], buffer.at[:, place, :], sem))

    def copy(first, size: int):
        source = cache.at[page_of(full), heads, pl.ds(pl.multiple_of(first * tile, size * tile), size * tile), :]
        place = pl.ds(pl.multiple_of(full * page_size + first * tile, size * tile), size * tile)
        return pltpu.make_async_copy(source, buffer.at[:, place, :], sem)

    copy_tiles(act, copy, lax.rem(tiles, tiles_of_page), tiles_of_page - 1)


def copy_tiles(act: Callable, copy: Callable, count, most: int) -> None:
    """Acts on copies of the first `count` tiles: of a power of two, and of each lower one that it takes to add up to
    them. No copy crosses a multiple of its size, as VMEM's tiles may be larger than HBM's.

    Args:
      act: as above.
      copy: (first tile, how many) to a copy.
      most: that `count` may be.
    """
    size = floor_pow2(most) if most else 0
    while size:

        @pl.when((count & size) > 0)
        def _tiles(size=size):
            act(copy(lax.div(count, 2 * size) * (2 * size), size))

        size //= 2

"""The next product's weight on its way to L2 while the attention of few rows leaves the memory idle.

Nothing waits for it, and no result depends on it: the hardware may drop it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Chosen between timings of a layer of Llama 3.1 8B with 2 rows of 500 keys on an H100, 172.6 us without: 16 MiB after
# 1500 ns 170.4, after 2500 ns 171.5; at once, by the blocks with keys to read alone, 171.7; 8 MiB at once 171.7. The
# keys should be asked for first. The norms gain nothing by it: they last longer by what the products save.
AMOUNT = 16 << 20  # bytes
DELAY = 1500  # nanoseconds
MAX_ROWS = 8  # with more there are more keys to read; a layer of 256 rows gains nothing
ROWS, COLUMNS = 64, 256  # of one request


def is_worth_it(weight: jax.Array, rows: int) -> bool:
    """Whether a batch of `rows` decodes should prefetch: there is time to, requests of one size make up the weight, and
    it is not smaller than those that were timed."""
    whole = weight.shape[0] % ROWS == 0 and weight.shape[1] % COLUMNS == 0
    return rows <= MAX_ROWS and whole and weight.size * weight.dtype.itemsize >= AMOUNT


def prefetch(weight_ref, block, blocks: int) -> None:
    """Asks for this block's share of AMOUNT of a weight [K, N], spread evenly over its depth: a product that is split
    over the depth begins in several places at once.

    Args:
      weight_ref: in global memory.
      block, blocks: this block's number, and how many share the asking.
    """
    depth, width = weight_ref.shape
    across, groups = width // COLUMNS, depth // ROWS
    request = ROWS * COLUMNS * jnp.dtype(weight_ref.dtype).itemsize
    wanted = max(AMOUNT // (request * across), 1)  # of the groups of ROWS rows
    pl.delay(DELAY)

    @pl.loop(block, wanted * across, step=blocks)
    def _ask(index):
        row = lax.div(lax.div(index, across) * groups, wanted) * ROWS
        column = lax.rem(index, across) * COLUMNS
        plgpu.async_prefetch(weight_ref.at[pl.ds(row, ROWS), pl.ds(column, COLUMNS)])

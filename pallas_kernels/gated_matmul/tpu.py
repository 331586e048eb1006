"""Gate and up projection with their activation on TPU, in Mosaic TPU (Pallas): neither product reaches HBM.

XLA:TPU writes both products and reads them again, since its fusions do not join two columns of one product. Here a grid
step takes a block of rows of x, all of their depth, and a strip of columns of both halves of the weight; the block of
rows stays in VMEM while the strips of the whole weight pass. Within a step tiles of rows are multiplied with parts of
the depth, and summed in float32.

Bytes: x is read once and the output written once; the weight is read once for each block of rows. Blocks have as many
rows as VMEM has room for, and where a step has less than about the chip's operations a byte, the products wait for the
weight in any case.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..mosaic_tpu import keep_in_vmem, result
from ..ragged_paged_attention.tpu_sizes import Chip, chip_of
from ..ragged_paged_attention.tpu_traffic import Traffic
from ..strips_tpu import TILE_ROWS, Strips, blocks_of, depth_of_product
from .reference import ACTIVATIONS


class Sizes(Strips):
    """Columns are those of the output, of which a strip has as many of either half of the weight."""

    def passing(self, depth: int, itemsize: int) -> int:
        strips = 2 * 2 * depth * self.columns
        out = 2 * self.rows * self.columns
        kept = (strips + out) * itemsize + 4 * TILE_ROWS * self.columns * 4
        return kept + kept // 4


def sizes_for(rows: int, depth: int, columns: int, itemsize: int, chip: Chip) -> Sizes | None:
    """The most rows a block that VMEM has room for; None where whole tiles do not make up these shapes."""
    if rows % TILE_ROWS or depth % 128:
        return None
    part = depth_of_product(depth)
    for block in blocks_of(rows):
        for width in (256, 128):
            parts = chip.cores if columns % (chip.cores * width) == 0 else 1
            sizes = Sizes(block, width, part, parts)
            if columns % width == 0 and sizes.vmem(depth, itemsize) <= chip.vmem_limit_bytes:
                return sizes
    return None


def _body(x, gate, up, out, *, sizes: Sizes, activation: str):
    depth = x.shape[1]

    @pl.loop(0, sizes.rows // TILE_ROWS)
    def _tile(tile):
        rows = pl.ds(pl.multiple_of(tile * TILE_ROWS, TILE_ROWS), TILE_ROWS)

        def add(part, sums):
            at = pl.ds(pl.multiple_of(part * sizes.depth, sizes.depth), sizes.depth)
            left = x[rows, at]
            return tuple(
                total + jnp.dot(left, half[at, :], preferred_element_type=jnp.float32)
                for total, half in zip(sums, (gate, up), strict=True)
            )

        zeros = jnp.zeros((TILE_ROWS, sizes.columns), jnp.float32)
        gated, raised = lax.fori_loop(0, depth // sizes.depth, add, (zeros, zeros))
        out[rows, :] = (ACTIVATIONS[activation](gated) * raised).astype(out.dtype)


def keeps_decodes(chip: str | None = None) -> bool:
    """Whether both products of a decode stay on the chip, so that XLA is better: it fetches the weight while attention
    runs."""
    return chip_of(chip).keeps_results


def supports(x: jax.Array, weight: jax.Array, activation: str, chip: str | None = None) -> bool:
    """Whether whole tiles make up these shapes, and VMEM has room for them; few rows are better served by XLA."""
    return (
        x.dtype == weight.dtype == jnp.bfloat16
        and activation in ("silu", "gelu_tanh")
        and bool(_sizes(x, weight, chip))
    )


def _sizes(x: jax.Array, weight: jax.Array, chip: str | None) -> Sizes | None:
    (rows, depth), columns = x.shape, weight.shape[1] // 2
    return sizes_for(rows, depth, columns, x.dtype.itemsize, chip_of(chip))


def gated_matmul(
    x: jax.Array,
    weight: jax.Array,
    *,
    activation: str,
    chip: str | None = None,
    sizes: Sizes | None = None,
    interpret=False,
) -> jax.Array:
    """See `api.gated_matmul`. Both products are summed in float32, and rounded once, after the activation.

    Args:
      chip: a name in the attention kernels' tpu_tuned.json; None takes the abstract mesh's chip.
      sizes: None takes those for the chip.
      interpret: False, or `pltpu.InterpretParams` to run on the CPU.

    Raises:
      ValueError: unless `supports(x, weight, activation)`, or for sizes that do not divide the shapes.
    """
    (rows, depth), columns = x.shape, weight.shape[1] // 2
    if sizes is None and not supports(x, weight, activation, chip):
        raise ValueError(
            f"{activation} of x {x.shape} {x.dtype.name} and weight {weight.shape} is not supported on TPU: bfloat16, "
            f"silu or gelu_tanh, T a multiple of {TILE_ROWS}, K and N of 128"
        )
    sizes = sizes or _sizes(x, weight, chip)
    assert sizes is not None
    strips = columns // (sizes.columns * sizes.parts)
    device = chip_of(chip)
    room = device.vmem_limit_bytes - sizes.vmem(depth, x.dtype.itemsize) if device.stay_bytes else 0
    all_stay = sizes.rows == rows and device.stay_bytes > 0
    if all_stay:
        x = keep_in_vmem(x, x.nbytes, interpret)
    needed = (sizes.passing if all_stay else sizes.vmem)(depth, x.dtype.itemsize)

    def half(first):
        return pl.BlockSpec((depth, sizes.columns), lambda part, block, strip: (0, first + part * strips + strip))

    blocks = pl.BlockSpec((sizes.rows, depth), lambda part, block, strip: (block, 0), pipeline_mode=pl.Buffered(1))
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)  # taken from where XLA has put it, without a copy
    return pl.pallas_call(
        functools.partial(_body, sizes=sizes, activation=activation),
        grid=(sizes.parts, rows // sizes.rows, strips),
        in_specs=[
            whole if all_stay else blocks,
            half(0),
            half(columns // sizes.columns),
        ],
        out_specs=pl.BlockSpec((sizes.rows, sizes.columns), lambda part, block, strip: (block, part * strips + strip)),
        out_shape=result((rows, columns), x.dtype, room, interpret),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=needed
        ),
        interpret=interpret,
        name=f"gated_matmul_{rows}",
    )(x, weight, weight)


def traffic(rows: int, depth: int, columns: int, itemsize: int, chip: str) -> Traffic | None:
    """What the kernel moves for [rows, depth] times [depth, 2 columns], for accounting: of the weight, and of x beyond
    once. None where it does not run."""
    sizes = sizes_for(rows, depth, columns, itemsize, chip_of(chip))
    if sizes is None:
        return None
    weight = rows // sizes.rows * depth * 2 * columns
    return Traffic((weight + (sizes.parts - 1) * rows * depth) * itemsize, 0, 2 * rows * depth * 2 * columns)

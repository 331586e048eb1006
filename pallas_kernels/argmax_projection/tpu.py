"""The projection to a row's largest entry on TPU, in Mosaic TPU (Pallas): its product exists a strip at a time.

XLA writes all logits of a step in float32 and reads them again for their maximum. Of 256 rows over 151,936 tokens that
is as much as the weight of 1024 columns itself, and does not fit into VMEM. Here a grid step multiplies all rows with a
strip of the vocabulary, and keeps in each lane the largest entry so far and where it stood; lanes meet at the end.

Bytes: x and the weight are read once, two numbers a row are written.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..ragged_paged_attention.tpu_sizes import LANES, Chip, chip_of
from ..ragged_paged_attention.tpu_traffic import Traffic

MIN_ROWS = 64  # the logits of fewer stay in VMEM
TILE_ROWS = 16  # of bfloat16
STRIP_BYTES = 4 << 20  # of the weight; two of them are in VMEM at once
MOST_COLUMNS = 1024  # of a strip, whose product is float32 [T, columns]
BEYOND = 2**31 - 1  # a column where none holds the largest entry


def columns_of_strip(rows: int, depth: int, itemsize: int, chip: Chip) -> int | None:
    """Whole lanes; None where VMEM has no room for the least."""
    columns = min(MOST_COLUMNS, max(1, STRIP_BYTES // (depth * itemsize * LANES)) * LANES)
    while columns > LANES and _vmem(rows, depth, columns, itemsize) > chip.vmem_limit_bytes:
        columns //= 2 * LANES
        columns = max(1, columns) * LANES
    return columns if _vmem(rows, depth, columns, itemsize) <= chip.vmem_limit_bytes else None


def _vmem(rows: int, depth: int, columns: int, itemsize: int) -> int:
    kept = (2 * columns + 2 * rows) * depth * itemsize + 2 * rows * columns * 4 + 6 * rows * LANES * 4
    return kept + kept // 4


def supports(x: jax.Array, weight: jax.Array, *, by_columns: bool, chip: str | None = None) -> bool:
    """Whether there are enough rows, in whole tiles, of whole lanes in bfloat16."""
    (rows, depth), columns = x.shape, weight.shape[0 if by_columns else 1]
    return (
        x.dtype == weight.dtype == jnp.bfloat16
        and rows >= MIN_ROWS
        and rows % TILE_ROWS == 0
        and depth % LANES == 0
        and columns >= MOST_COLUMNS
        and columns_of_strip(rows, depth, x.dtype.itemsize, chip_of(chip)) is not None
    )


def _body(num_valid, x, weight, largest, at, best, where, *, strips: int, columns: int, by_columns: bool, cap):
    """best, where: float32 and int32 [T, LANES], of each lane; `where` counts columns."""
    part, turn = pl.program_id(0), pl.program_id(1)
    first = (part * strips + turn) * columns  # of the strip, even where there is none such

    @pl.when(turn == 0)
    def _begin():
        best[...] = jnp.full_like(best, -jnp.inf)
        where[...] = jnp.full_like(where, BEYOND)

    wanted = (((1,), (1 if by_columns else 0,)), ((), ()))
    entries = lax.dot_general(x[...], weight[...], wanted, preferred_element_type=jnp.float32)
    lane = lax.broadcasted_iota(jnp.int32, best.shape, 1)
    for start in range(0, columns, LANES):
        part_of = entries[:, start : start + LANES]
        if cap is not None:
            part_of = cap * jnp.tanh(part_of / cap)
        part_of = jnp.where(part_of < jnp.inf, part_of, jnp.inf)
        column = first + start + lane
        part_of = jnp.where(column < num_valid[0], part_of, -jnp.inf)
        is_better = part_of > best[...]
        where[...] = jnp.where(is_better, column, where[...])
        best[...] = jnp.where(is_better, part_of, best[...])

    @pl.when(turn == strips - 1)
    def _end():
        most = jnp.max(best[...], axis=1, keepdims=True)
        found = jnp.min(jnp.where(best[...] == most, where[...], BEYOND), axis=1, keepdims=True)
        largest[...] = jnp.broadcast_to(most, best.shape)[None]
        at[...] = jnp.broadcast_to(found, best.shape)[None]


def argmax_projection(
    x: jax.Array,
    weight: jax.Array,
    num_valid: jax.Array | int,
    *,
    by_columns: bool,
    cap: float | None = None,
    chip: str | None = None,
    columns: int | None = None,
    parts: int | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.argmax_projection`. Products are summed in float32.

    Args:
      chip: a name in the attention kernels' tpu_tuned.json; None takes the abstract mesh's chip.
      columns, parts: of a strip, and how many parts the strips are split into; None takes those for the chip.
      interpret: False, or `pltpu.InterpretParams` to run on the CPU.

    Raises:
      ValueError: unless `supports(x, weight)`.
    """
    if columns is None and not supports(x, weight, by_columns=by_columns, chip=chip):
        raise ValueError(
            f"x {x.shape} {x.dtype.name} and weight {weight.shape} are not supported on TPU: bfloat16, T at least "
            f"{MIN_ROWS} and a multiple of {TILE_ROWS}, K of {LANES}, N at least {MOST_COLUMNS}"
        )
    if not by_columns and weight.shape[1] % LANES:
        # XLA:TPU lays such a weight out by columns, since whole lanes of them would be padded; so this is no copy.
        weight, by_columns = weight.T, True
    device = chip_of(chip)
    (rows, depth), size = x.shape, weight.shape[0 if by_columns else 1]
    columns = columns or columns_of_strip(rows, depth, x.dtype.itemsize, device)
    assert columns is not None
    parts = parts or device.cores
    last = math.ceil(size / columns) - 1
    strips = math.ceil((last + 1) / parts)

    def of_weight(part, turn, *_):
        strip = jnp.minimum(part * strips + turn, last)  # beyond the last one nothing is valid
        return (strip, 0) if by_columns else (0, strip)

    of_part = pl.BlockSpec((1, rows, LANES), lambda part, turn, *_: (part, 0, 0))
    largest, at = pl.pallas_call(
        functools.partial(_body, strips=strips, columns=columns, by_columns=by_columns, cap=cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(parts, strips),
            in_specs=[
                pl.BlockSpec((rows, depth), lambda *_: (0, 0)),
                pl.BlockSpec((columns, depth) if by_columns else (depth, columns), of_weight),
            ],
            out_specs=[of_part, of_part],
            scratch_shapes=[pltpu.VMEM((rows, LANES), jnp.float32), pltpu.VMEM((rows, LANES), jnp.int32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((parts, rows, LANES), jnp.float32),
            jax.ShapeDtypeStruct((parts, rows, LANES), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_vmem(rows, depth, columns, x.dtype.itemsize),
        ),
        interpret=interpret,
        name=f"argmax_projection_{rows}",
    )(jnp.asarray(num_valid, jnp.int32).reshape(1), x, weight)
    most = jnp.max(largest[:, :, 0], axis=0)
    return most, jnp.min(jnp.where(largest[:, :, 0] == most, at[:, :, 0], BEYOND), axis=0)


def traffic(rows: int, depth: int, columns: int, chip: str) -> Traffic | None:
    """What it multiplies, for accounting; what it moves are its operands and results, each once. None where it does
    not run."""
    if rows < MIN_ROWS or rows % TILE_ROWS or depth % LANES or columns < MOST_COLUMNS:
        return None
    if columns_of_strip(rows, depth, 2, chip_of(chip)) is None:
        return None
    return Traffic(0, 0, 2 * rows * depth * columns)

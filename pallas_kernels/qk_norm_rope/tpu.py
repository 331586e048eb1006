"""Norm and rotation of queries and keys on TPU, in Mosaic TPU (Pallas), heads first, as attention's kernels take them.

XLA:TPU makes of the plain code several passes in float32 and transposes between them, whose arrays, several times as
large as the projection, do not all fit into VMEM. Here a grid step takes a block of rows, and of it one head after
another, so that nothing exists between the projection and what attention takes. Those arrays stay in VMEM where they
fit, and what this returns are transposed views of them, which attention's own transposes cancel.

Bytes: the projection is read once; queries, keys and values are written once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..mosaic_tpu import keep_in_vmem, result
from ..ragged_paged_attention.tpu_sizes import LANES, chip_of
from .types import Heads

BLOCK_BYTES = 1_000_000  # of the projection's rows; as much comes out, and Pallas' pipeline holds two of each
MOST_ROWS = 256
TILE_ROWS = 16  # of bfloat16


def _rows(num_tokens: int, row_bytes: int) -> int | None:
    """Rows a grid step; None where whole tiles do not make up the tokens."""
    rows = MOST_ROWS
    while rows > TILE_ROWS and (num_tokens % rows or rows * row_bytes > BLOCK_BYTES):
        rows //= 2
    return None if num_tokens % rows else rows


def keeps_decodes(chip: str | None = None) -> bool:
    """Whether what XLA makes of so few rows stays on the chip."""
    return chip_of(chip).keeps_results


def supports(qkv: jax.Array, tables: tuple[jax.Array, jax.Array], heads: Heads) -> bool:
    """Whether heads are whole lanes, and rotated whole, and whole tiles make up the tokens."""
    return (
        heads.dim in (LANES, 2 * LANES)
        and 2 * tables[0].shape[1] == heads.dim
        and qkv.dtype in (jnp.bfloat16, jnp.float32)
        and _rows(len(qkv), heads.width * qkv.dtype.itemsize) is not None
    )


def _halves_swapped(x):
    half = x.shape[1] // 2
    if half % LANES:
        return pltpu.roll(x, half, axis=1)
    return jnp.concatenate([x[:, half:], x[:, :half]], axis=1)


def signed_tables(table):
    """Cosines and sines [rows, dim] that a head and its swapped halves are multiplied with, from cosines beside sines
    [rows, dim]."""
    first = lax.broadcasted_iota(jnp.int32, table.shape, 1) < table.shape[1] // 2
    swapped = _halves_swapped(table)
    return jnp.where(first, table, swapped), jnp.where(first, -swapped, table)


def normed_and_rotated(head, weight, cos, sin, heads: Heads):
    """A head [rows, dim], normalized unless weight [1, dim] is None, and rotated, in its dtype. cos, sin: what
    `signed_tables` returns."""
    x = head.astype(jnp.float32)
    if weight is not None:
        weight = weight.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + heads.eps)
        x = x * (1.0 + weight) if heads.unit_offset else x.astype(head.dtype).astype(jnp.float32) * weight
        x = x.astype(head.dtype).astype(jnp.float32)
    return (x * cos + _halves_swapped(x) * sin).astype(head.dtype)


def _body(qkv, table, weights, queries, both, cos, sin, *, heads: Heads, is_normed: bool):
    """table: cosines, then sines; weights: the queries' norm's, then the keys'; both: keys, then values."""
    cos[...], sin[...] = signed_tables(table[...])

    def head(index):
        return qkv[:, pl.ds(pl.multiple_of(index * heads.dim, heads.dim), heads.dim)]

    def rotated(index, norm):
        weight = weights[pl.ds(norm, 1), :] if is_normed else None
        return normed_and_rotated(head(index), weight, cos[...], sin[...], heads)

    @pl.loop(0, heads.queries)
    def _query(index):
        queries[index] = rotated(index, 0)

    @pl.loop(0, heads.keys)
    def _key(index):
        both[index, :, : heads.dim] = rotated(heads.queries + index, 1)
        both[index, :, heads.dim :] = head(heads.queries + heads.keys + index)


def qk_norm_rope(
    qkv: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    weights: tuple[jax.Array, jax.Array] | None,
    heads: Heads,
    *,
    chip: str | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.qk_norm_rope`.

    Args:
      chip: a name in the attention kernels' tpu_tuned.json; None takes the abstract mesh's chip.
      interpret: False, or `pltpu.InterpretParams` to run on the CPU.

    Raises:
      ValueError: unless `supports(qkv, tables, heads)`.
    """
    if not supports(qkv, tables, heads):
        raise ValueError(
            f"qkv {qkv.shape} {qkv.dtype.name} with heads of {heads.dim}, of which {2 * tables[0].shape[1]} dims are "
            f"rotated, is not supported on TPU: bfloat16 or float32, heads of {LANES} or {2 * LANES} rotated whole, T "
            f"a multiple of {TILE_ROWS}"
        )
    num_tokens, dim = len(qkv), heads.dim
    rows = _rows(num_tokens, heads.width * qkv.dtype.itemsize)
    assert rows is not None
    norms = jnp.zeros((2, dim), qkv.dtype) if weights is None else jnp.stack(weights)
    device = chip_of(chip)
    room = device.vmem_limit_bytes // 2 if device.stay_bytes else 0

    def by_rows(width):
        return pl.BlockSpec((rows, width), lambda block: (block, 0))

    def by_heads(count, width):
        return pl.BlockSpec((count, rows, width), lambda block: (0, block, 0))

    queries, both = pl.pallas_call(
        functools.partial(_body, heads=heads, is_normed=weights is not None),
        grid=(num_tokens // rows,),
        in_specs=[by_rows(heads.width), by_rows(dim), pl.BlockSpec((2, dim), lambda block: (0, 0))],
        out_specs=[by_heads(heads.queries, dim), by_heads(heads.keys, 2 * dim)],
        out_shape=[
            result((heads.queries, num_tokens, dim), qkv.dtype, room, interpret),
            result((heads.keys, num_tokens, 2 * dim), qkv.dtype, room, interpret),
        ],
        scratch_shapes=[pltpu.VMEM((rows, dim), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=8 * BLOCK_BYTES),
        cost_estimate=pl.CostEstimate(flops=10 * qkv.size, transcendentals=0, bytes_accessed=2 * qkv.nbytes),
        interpret=interpret,
        name="qk_norm_rope",
    )(keep_in_vmem(qkv, room, interpret), jnp.concatenate(tables, axis=1), norms)
    both = both.transpose(1, 0, 2)
    return queries.transpose(1, 0, 2), both[:, :, :dim], both[:, :, dim:]

"""Projection to queries, keys and values with their norm and rotation on TPU, in Mosaic TPU (Pallas): what the product
makes never exists whole, only heads as attention's kernels take them.

A grid step takes a block of rows of x, all of their depth, and a strip of the weight's columns, which is one head or
two. It multiplies tiles of rows with parts of the depth, sums in float32, rounds as a projection does, and normalizes
and rotates the tile's heads while they are in VMEM. Strips of queries come first, then keys and values by turns: a key
stands beside its value in one array, as in the cache, so that either strip fills half of a block of it.

Bytes: x is read once, queries, keys and values are written once; the weight is read once for each block of rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..mosaic_tpu import keep_in_vmem, result
from ..qk_norm_rope.tpu import normed_and_rotated, signed_tables
from ..qk_norm_rope.types import Heads
from ..ragged_paged_attention.tpu_sizes import LANES, Chip, chip_of
from ..ragged_paged_attention.tpu_traffic import Traffic
from ..strips_tpu import TILE_ROWS, Strips, blocks_of, depth_of_product

STRIP = 2 * LANES  # columns: as wide as the widest MXU


class Sizes(Strips):
    """Columns are those of the weight, whole heads."""

    def passing(self, depth: int, itemsize: int, *, results_stay: bool = False) -> int:
        """As `Strips.passing`; results that stay in VMEM are written where they lie."""
        strips = 2 * depth * self.columns
        out = 0 if results_stay else 2 * 3 * self.rows * self.columns
        tables = self.rows * STRIP * 4
        kept = (strips + out) * itemsize + tables + 8 * TILE_ROWS * self.columns * 4
        return kept + kept // 4


def sizes_for(rows: int, depth: int, heads: Heads, itemsize: int, chip: Chip) -> Sizes | None:
    """The most rows a block that VMEM has room for; None where whole tiles do not make up these shapes."""
    if rows % TILE_ROWS or depth % LANES or heads.dim not in (LANES, STRIP):
        return None
    part = depth_of_product(depth)
    of_queries, of_keys = heads.queries * heads.dim, heads.keys * heads.dim
    columns = heads.dim if of_queries % STRIP or of_keys % STRIP else STRIP
    parts = 1 if (of_queries // columns) % chip.cores or (of_keys // columns) % chip.cores else chip.cores
    for block in blocks_of(rows):
        sizes = Sizes(block, columns, part, parts)
        if sizes.vmem(depth, itemsize) <= chip.vmem_limit_bytes:
            return sizes
    return None


def _body(x, weight, table, norms, queries, both, *, heads: Heads, sizes: Sizes, query_strips: int, is_normed: bool):
    """norms: the queries', then the keys'; both: keys beside values."""
    depth, dim = x.shape[1], heads.dim
    strip = pl.program_id(2)
    of_queries = strip < query_strips
    of_keys = jnp.logical_not(of_queries) & (lax.rem(strip - query_strips, 2) == 0)

    @pl.loop(0, sizes.rows // TILE_ROWS)
    def _tile(tile):
        rows = pl.ds(pl.multiple_of(tile * TILE_ROWS, TILE_ROWS), TILE_ROWS)

        def add(part, total):
            at = pl.ds(pl.multiple_of(part * sizes.depth, sizes.depth), sizes.depth)
            return total + jnp.dot(x[rows, at], weight[at, :], preferred_element_type=jnp.float32)

        zeros = jnp.zeros((TILE_ROWS, sizes.columns), jnp.float32)
        projected = lax.fori_loop(0, depth // sizes.depth, add, zeros).astype(x.dtype)
        each = [projected[:, first : first + dim] for first in range(0, sizes.columns, dim)]

        def rotated(norm: int):
            cos, sin = signed_tables(table[rows, :])
            scale = norms[pl.ds(norm, 1), :] if is_normed else None
            return [normed_and_rotated(head, scale, cos, sin, heads) for head in each]

        @pl.when(of_queries)
        def _queries():
            for index, head in enumerate(rotated(0)):
                queries[index, rows, :] = head

        @pl.when(of_keys)
        def _keys():
            for index, head in enumerate(rotated(1)):
                both[index, rows, :dim] = head

        @pl.when(jnp.logical_not(of_queries | of_keys))
        def _values():
            for index, head in enumerate(each):
                both[index, rows, dim:] = head


def gains(chip: str | None = None, *, of_decodes: bool = False) -> bool:
    """Whether the projection, which is small in a step of decodes, would leave the chip otherwise, so that the kernel
    moves less than XLA's product."""
    device = chip_of(chip)
    return device.projects_heads and not (of_decodes and device.keeps_results)


def supports(
    x: jax.Array, weight: jax.Array, tables: tuple[jax.Array, jax.Array], heads: Heads, chip: str | None = None
) -> bool:
    """Whether heads are whole lanes and rotated whole, and whole tiles that VMEM has room for make up the shapes."""
    return (
        x.dtype == weight.dtype == jnp.bfloat16
        and 2 * tables[0].shape[1] == heads.dim
        and bool(sizes_for(x.shape[0], x.shape[1], heads, x.dtype.itemsize, chip_of(chip)))
    )


def qkv_projection(
    x: jax.Array,
    weight: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    norms: tuple[jax.Array, jax.Array] | None,
    heads: Heads,
    *,
    chip: str | None = None,
    sizes: Sizes | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.qkv_projection`. Products are summed in float32.

    Args:
      chip: a name in the attention kernels' tpu_tuned.json; None takes the abstract mesh's chip.
      sizes: None takes those for the chip.
      interpret: False, or `pltpu.InterpretParams` to run on the CPU.

    Raises:
      ValueError: unless `supports(x, weight, tables, heads)`.
    """
    if not supports(x, weight, tables, heads, chip):
        raise ValueError(
            f"x {x.shape} {x.dtype.name} projected to heads of {heads.dim}, of which {2 * tables[0].shape[1]} dims are "
            f"rotated, is not supported on TPU: bfloat16, heads of {LANES} or {STRIP} rotated whole, T a multiple of "
            f"{TILE_ROWS}, K of {LANES}"
        )
    (num_tokens, depth), dim, device = x.shape, heads.dim, chip_of(chip)
    sizes = sizes or sizes_for(num_tokens, depth, heads, x.dtype.itemsize, device)
    assert sizes is not None
    per_strip = sizes.columns // dim
    query_strips = heads.queries // (per_strip * sizes.parts)
    pairs = heads.keys // (per_strip * sizes.parts)
    room = device.vmem_limit_bytes // 2 if device.stay_bytes else 0
    all_stay = sizes.rows == num_tokens and device.stay_bytes > 0
    if all_stay:
        x = keep_in_vmem(x, x.nbytes, interpret)
    most = max(heads.queries, 2 * heads.keys) * num_tokens * dim * x.dtype.itemsize
    needed = sizes.passing(depth, x.dtype.itemsize, results_stay=most <= room)
    needed += 0 if all_stay else sizes.rows * depth * x.dtype.itemsize
    weights = jnp.zeros((2, dim), x.dtype) if norms is None else jnp.stack(norms)

    def pair(part, strip):
        return part * pairs + jnp.maximum(strip - query_strips, 0) // 2

    def of_weight(part, block, strip):
        turn = lax.rem(jnp.maximum(strip - query_strips, 0), 2)
        of_pair = sizes.parts * (query_strips + turn * pairs) + pair(part, strip)
        return 0, jnp.where(strip < query_strips, part * query_strips + strip, of_pair)

    def of_queries(part, block, strip):
        return part * query_strips + jnp.minimum(strip, query_strips - 1), block, 0

    def by_rows(width):
        return pl.BlockSpec((sizes.rows, width), lambda part, block, strip: (block, 0), pipeline_mode=pl.Buffered(1))

    whole = pl.BlockSpec(memory_space=pltpu.VMEM)  # taken from where XLA has put it, without a copy
    queries, both = pl.pallas_call(
        functools.partial(_body, heads=heads, sizes=sizes, query_strips=query_strips, is_normed=norms is not None),
        grid=(sizes.parts, num_tokens // sizes.rows, query_strips + 2 * pairs),
        in_specs=[
            whole if all_stay else by_rows(depth),
            pl.BlockSpec((depth, sizes.columns), of_weight),
            by_rows(dim),
            pl.BlockSpec((2, dim), lambda *_: (0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((per_strip, sizes.rows, dim), of_queries),
            pl.BlockSpec((per_strip, sizes.rows, 2 * dim), lambda part, block, strip: (pair(part, strip), block, 0)),
        ],
        out_shape=[
            result((heads.queries, num_tokens, dim), x.dtype, room, interpret),
            result((heads.keys, num_tokens, 2 * dim), x.dtype, room, interpret),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=needed
        ),
        interpret=interpret,
        name=f"qkv_projection_{num_tokens}",
    )(x, weight, jnp.concatenate(tables, axis=1), weights)
    both = both.transpose(1, 0, 2)
    return queries.transpose(1, 0, 2), both[:, :, :dim], both[:, :, dim:]


def traffic(rows: int, depth: int, heads: Heads, itemsize: int, chip: str) -> Traffic | None:
    """What the kernel moves of the weight and of x beyond once, for accounting. None where it does not run."""
    sizes = sizes_for(rows, depth, heads, itemsize, chip_of(chip))
    if sizes is None:
        return None
    weight = rows // sizes.rows * depth * heads.width
    return Traffic((weight + (sizes.parts - 1) * rows * depth) * itemsize, 0, 2 * rows * depth * heads.width)

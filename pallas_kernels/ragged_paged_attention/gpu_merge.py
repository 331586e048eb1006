"""Joins what decode's streams left of the pairs that several of them share, and zeroes the padding tokens."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .gpu_common import NO_MAXIMUM
from .gpu_plan import BEGIN, PLACE, RUN, TILES, DecodePlan, streams_of

BLOCKS = 16  # that run on a multiprocessor together


class Parts(NamedTuple):
    """Partial results, normalised, of pairs: part 2s is of the first pair of stream s where it continues the stream
    before, 2s + 1 of its last pair, and part 2 * streams + p the whole of pair p, numbered among the pairs of its kind.

    Attributes:
      values: float32[parts, rows, head_dim]; a row is a query head of the pair.
      lse: float32[parts, 64], the logarithm to base 2 of each row's sum of exponents.
    """

    values: Any  # arrays outside of kernels, Refs inside
    lse: Any


def part_rows(group: int, head_dim: int) -> int:
    """Rows of a stored part: a register array has a multiple of 128 elements."""
    return group + (group * head_dim % 128 != 0)


def _merge_body(
    items_ref, counts_ref, own: Parts, shared: Parts | None, out_ref, stage,
    *, group: int, streams: int, num_runs: int, blocks: int, clear: bool,
):  # fmt: skip
    num_tokens, num_heads, head_dim = out_ref.shape
    num_kv_heads, rows = num_heads // group, stage.shape[0]
    pieces = own.values.shape[1] // rows
    layout = plgpu.Layout.WG_STRIDED((rows, head_dim), vec_size=rows * head_dim // 128)
    zeros = plgpu.layout_cast(jnp.zeros((rows, head_dim), jnp.float32), layout)
    row_of = plgpu.broadcasted_iota(jnp.int32, (rows, head_dim), 0, layout=layout)
    length = jnp.maximum(counts_ref[0], 1)
    own_chunk, shared_chunk = (16, 4) if rows * head_dim == 128 else (4, 2)  # parts that are loaded together
    pairs = min(num_tokens, items_ref.shape[0] - num_runs) * num_kv_heads

    def parts_of(item, head, number):
        """(how many parts a pair has, the number of its i-th part)"""
        first, last = streams_of(items_ref[item, BEGIN], items_ref[item, TILES], head, length)
        more = last - first

        def part(i):
            cut = 2 * (first + i) + jnp.where(i == 0, 1, 0)
            return jnp.where(more > 0, cut, 2 * streams + number)

        return more + 1, part

    def join(parts: Parts, count, part, first_row, chunk: int, state):
        def several(index, state):
            total, highest, weight = state
            values, lses = [], []
            for i in range(chunk):
                number = index * chunk + i
                source = part(jnp.minimum(number, count - 1))
                values.append(plgpu.load(parts.values.at[source, pl.ds(first_row, rows)]))  # laid out as `total` is
                lse = zeros + parts.lse[source, first_row]
                for j in range(1, rows):
                    lse = jnp.where(row_of == j, parts.lse[source, first_row + j], lse)
                lses.append(lse + jnp.where(number < count, 0.0, 2 * NO_MAXIMUM))  # past the last: no weight
            new_highest = functools.reduce(jnp.maximum, lses, highest)
            alpha = jnp.exp2(highest - new_highest)
            total, weight = total * alpha, weight * alpha
            for value, lse in zip(values, lses):
                beta = jnp.exp2(lse - new_highest)
                total, weight = total + value * beta, weight + beta
            return total, new_highest, weight

        return lax.fori_loop(0, pl.cdiv(count, chunk), several, state)

    def put(pair, piece, value):
        first = lax.rem(pair, num_kv_heads) * group + piece * rows
        if group % rows == 0:
            out_ref[lax.div(pair, num_kv_heads), pl.ds(first, rows)] = value.astype(out_ref.dtype)
            return
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        stage[...] = value.astype(stage.dtype)
        plgpu.commit_smem()
        for i in range(rows):

            @pl.when(piece * rows + i < group)
            def _():
                plgpu.copy_smem_to_gmem(stage.at[i], out_ref.at[lax.div(pair, num_kv_heads), first + i])

    @pl.loop(lax.axis_index("block"), pairs * pieces, step=blocks)
    def _piece(index):
        pair, piece = lax.div(index, pieces), lax.rem(index, pieces)
        row, head = lax.div(pair, num_kv_heads), lax.rem(pair, num_kv_heads)
        run = items_ref[num_runs + row, RUN] if shared else 0
        count, part = parts_of(num_runs + row, head, pair)

        @pl.when((count > 1) | (run > 0))
        def _join_parts():
            state = join(own, count, part, piece * rows, own_chunk, (zeros, zeros + NO_MAXIMUM, zeros))
            if shared:
                common = jnp.maximum(run - 1, 0)
                count_shared, part_shared = parts_of(common, head, common * num_kv_heads + head)
                count_shared = jnp.where(run > 0, count_shared, 0)
                first_row = items_ref[num_runs + row, PLACE] * group + piece * rows
                state = join(shared, count_shared, part_shared, first_row, shared_chunk, state)
            put(pair, piece, state[0] / state[2])

        if clear:
            pl.when(row >= counts_ref[2])(lambda: put(pair, piece, zeros))

    plgpu.wait_smem_to_gmem(0)


def merge(
    out_ref,
    own: Parts,
    shared: Parts | None,
    plan: DecodePlan,
    *,
    group: int,
    streams: int,
    multiprocessors: int,
    clear: bool,
    interpret=False,
) -> None:
    """Writes the results of the pairs of which there are parts into `out_ref`.

    Args:
      out_ref: Ref [T, num_heads, head_dim], which holds what `decode` wrote.
      own, shared: what `decode` left of the rows' own keys and of the keys that runs of rows share.
      group: query heads a key-value head.
      multiprocessors: how many there are to use.
      clear: whether T is the number of rows, and to write zeros for those that are padding.
    """
    num_tokens, num_heads, head_dim = out_ref.shape
    pairs, stored = min(num_tokens, plan.order.shape[0]) * (num_heads // group), own.values.shape[1]
    rows = max(1, 128 // head_dim)
    while rows < 4 and stored % (2 * rows) == 0 and pairs * stored // (2 * rows) >= 4 * multiprocessors:
        rows *= 2  # many pairs: larger pieces of them; few: more of the machine
    blocks = min(pairs * stored // rows, BLOCKS * multiprocessors)
    operands = [*own, *(shared or ())]

    def body(items_ref, counts_ref, *refs):
        own, rest = Parts(*refs[:2]), refs[len(operands) :]
        shared = Parts(*refs[2:4]) if len(operands) == 4 else None
        sizes = {"group": group, "streams": streams, "num_runs": num_runs, "blocks": blocks}
        _merge_body(items_ref, counts_ref, own, shared, *rest, **sizes, clear=clear)

    num_runs = plan.items.shape[0] - plan.order.shape[0]
    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=(plgpu.SMEM((rows, head_dim), out_ref.dtype),),
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="ragged_paged_merge",
    )(plan.items, plan.counts, *operands, out_ref)

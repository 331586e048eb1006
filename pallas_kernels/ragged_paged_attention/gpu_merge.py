"""Joins what decode's streams left of the pairs that several of them share, and zeroes the padding tokens."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .gpu_common import NO_MAXIMUM

CHUNK = 16  # parts that are loaded together


class Parts(NamedTuple):
    """Partial results of the streams, for `merge`.

    Attributes:
      plan: int32[streams, 5], see `decode_plan`.
      values: float32[streams, 2 (of the first pair, of the last), query heads a key-value head, head_dim], normalised.
      lse: like values: the logarithm to base 2 of the sum of exponents, the same in all columns.
    """

    plan: Any  # arrays outside of kernels, Refs inside
    values: Any
    lse: Any


def part_rows(group: int, head_dim: int) -> int:
    """Rows of a stored part: a register array has a multiple of 128 elements."""
    return group + (group * head_dim % 128 != 0)


def _merge_body(plan_ref, values_ref, lse_ref, count_ref, out_ref, stage, *, group: int, rows: int, clear: bool):
    stream, streams = lax.axis_index("stream"), values_ref.shape[0]
    piece, pieces = lax.axis_index("piece"), values_ref.shape[2] // rows
    num_tokens, num_heads, head_dim = out_ref.shape
    num_kv_heads = num_heads // group
    vector = rows * head_dim // 128
    layout = plgpu.Layout.WG_STRIDED((rows, head_dim), vec_size=vector)
    continuing = plan_ref[stream, 4]

    @pl.when(continuing > 0)
    def _join_parts():
        pair = plan_ref[stream, 0]

        def join(index, state):
            total, highest, weight = state
            values, lses = [], []
            for i in range(CHUNK):
                number = index * CHUNK + i  # part 0 is the last of the stream before, the others are first ones
                known = jnp.minimum(number, continuing)
                source = (stream - 1 + known, jnp.where(known == 0, 1, 0), pl.ds(piece * rows, rows))
                value, lse = (plgpu.load(ref.at[source], layout=layout) for ref in (values_ref, lse_ref))
                values.append(value)
                lses.append(lse + jnp.where(number == known, 0.0, 2 * NO_MAXIMUM))  # past the last: weighs nothing
            new_highest = functools.reduce(jnp.maximum, lses, highest)
            alpha = jnp.exp2(highest - new_highest)
            total, weight = total * alpha, weight * alpha
            for value, lse in zip(values, lses):
                beta = jnp.exp2(lse - new_highest)
                total, weight = total + value * beta, weight + beta
            return total, new_highest, weight

        zeros = plgpu.layout_cast(jnp.zeros((rows, head_dim), jnp.float32), layout)
        state = (zeros, zeros + NO_MAXIMUM, zeros)
        total, _, weight = lax.fori_loop(0, lax.div(continuing, CHUNK) + 1, join, state)
        stage[...] = (total / weight).astype(stage.dtype)
        plgpu.commit_smem()
        row, head = lax.div(pair, num_kv_heads), lax.rem(pair, num_kv_heads)
        for i in range(rows):

            @pl.when(piece * rows + i < group)
            def _():
                target = out_ref.at[row, head * group + piece * rows + i]
                plgpu.copy_smem_to_gmem(stage.at[i], target)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    if clear:
        first = count_ref[0] * num_heads + stream * pieces + piece

        @pl.when(first < num_tokens * num_heads)
        def _clear_padding():
            zeros = plgpu.layout_cast(jnp.zeros((rows, head_dim), stage.dtype), layout)
            stage[...] = zeros
            plgpu.commit_smem()

            @pl.loop(first, num_tokens * num_heads, step=streams * pieces)
            def _(index):
                target = out_ref.at[lax.div(index, num_heads), lax.rem(index, num_heads)]
                plgpu.copy_smem_to_gmem(stage.at[0], target)

    plgpu.wait_smem_to_gmem(0)


def merge(out_ref, parts: Parts, count: jax.Array, *, group: int, clear: bool, interpret=False) -> None:
    """Writes the results of the pairs that were cut into `out_ref`.

    Args:
      out_ref: Ref [T, num_heads, head_dim], which holds what `decode` wrote.
      parts: what `decode` left.
      count: int32[], how many tokens are real.
      group: query heads a key-value head.
      clear: whether to write zeros for the tokens from `count` on.
    """
    head_dim = out_ref.shape[2]
    rows = max(1, 128 // head_dim)
    streams, pieces = parts.values.shape[0], parts.values.shape[2] // rows
    plgpu.kernel(
        functools.partial(_merge_body, group=group, rows=rows, clear=clear),
        out_type=(),
        scratch_types=(plgpu.SMEM((rows, head_dim), out_ref.dtype),),
        grid=(streams, pieces),
        grid_names=("stream", "piece"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="ragged_paged_merge",
    )(*parts, count[None], out_ref)

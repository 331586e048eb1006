"""Residual sum and norm on NVIDIA GPUs, in Mosaic GPU: each row is read once, by a warpgroup that keeps it in
registers.

Bytes: two rows in, two rows out. XLA takes three kernels for it, and reads the row three times.

A product with too few tiles of outputs for all multiprocessors is split over its depth; XLA sums the parts in a kernel
of its own, 1.2 to 3.8 microseconds for each of two products a layer. Here the sum of parts is in the same pass.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = 128  # threads of a warpgroup
MAX_WIDTH = 16384  # a row lives in registers: 128 of them a thread in float32
MULTIPROCESSORS = 132
TILE = 128  # rows and columns of a product that a multiprocessor computes at once
MOST_PARTS = 4


def _vector(width: int, itemsize: int) -> int | None:
    """Elements a thread loads at once, at most 16 bytes; None if the row cannot be dealt evenly."""
    sizes = [size for size in (8, 4, 2) if size * itemsize <= 16 and width % (LANES * size) == 0]
    return sizes[0] if sizes else None


def supports(width: int, dtype) -> bool:
    """Whether rows of this width and dtype can be normalized here."""
    return width <= MAX_WIDTH and jnp.dtype(dtype) == jnp.bfloat16 and _vector(width, 2) is not None


def parts(rows: int, depth: int, width: int) -> int:
    """In how many parts to split a product [rows, depth] by [depth, width] over its depth.

    As many as its tiles leave multiprocessors for, 4 at most. A layer's products and norms, microseconds on an H100,
    whole and in these parts: Llama 3.1 8B, 2 rows 164 and 161, 64 rows 190 and 185, 128 rows 199 and 194, 256 rows 221
    and 218; Qwen3 0.6B, 256 rows 49.2 and 45.5. With 16 rows it is 169 and 171: those stay whole, with all up to 48.
    One row does too: XLA multiplies and sums the parts of one, which takes a step of Llama 3.1 8B from 5.7 to 7.4 ms.
    """
    if rows == 1 or 8 < rows <= 48:
        return 1
    tiles = -(-rows // TILE) * -(-width // TILE)
    return max(count for count in (1, 2, MOST_PARTS) if count == 1 or _fits(count, tiles, depth))


def _fits(count: int, tiles: int, depth: int) -> bool:
    return count * tiles <= MULTIPROCESSORS and depth % (64 * count) == 0


def add_rms_norm(
    x: jax.Array, update: jax.Array, weight: jax.Array, *, eps: float, unit_offset: bool, interpret=False
) -> tuple[jax.Array, jax.Array]:
    """See `api.add_rms_norm`. Raises ValueError unless `supports(H, dtype)`."""
    tokens, width = x.shape
    vector = _vector(width, x.dtype.itemsize)
    if vector is None or not supports(width, x.dtype):
        raise ValueError(f"rows of {width} {x.dtype.name} are not supported on GPU: bfloat16, a multiple of 256")
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=vector)

    def body(x_ref, update_ref, weight_ref, sum_ref, out_ref):
        row = lax.axis_index("row")

        def load(ref):
            return plgpu.load(ref, layout=layout, optimized=False)

        summands = [x_ref.at[row]]
        summands += [update_ref.at[row]] if update.ndim == 2 else [update_ref.at[i, row] for i in range(len(update))]
        total, *others = (load(summand).astype(jnp.float32) for summand in summands)
        for other in others:
            total = total + other
        scale = load(weight_ref)
        rounded = total.astype(x.dtype)
        sum_ref[row] = rounded
        wide = rounded.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.sum(wide * wide) / width + eps)
        normed = wide * inverse
        if unit_offset:
            out_ref[row] = (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        else:
            out_ref[row] = normed.astype(x.dtype) * scale

    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape, x.dtype)),
        grid=(tokens,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=LANES * 4),
        interpret=interpret,
        kernel_name="add_rms_norm",
    )(x, update, weight)

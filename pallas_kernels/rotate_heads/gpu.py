"""Norm and rotation of a token's queries and keys on Hopper GPUs, in Mosaic GPU and in place: values stay where they
are.

A block is a token: its heads come by TMA as a tile of up to 64 rows, are normalized and rotated in registers, and go
back. Bytes: the queries and keys once in and once out. XLA's kernel for the rotation passes the values too, and takes
more than twice as long for thousands of tokens; for fewer than MIN_TOKENS it is the faster one.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..mosaic import tiled

MIN_TOKENS = 128
ROWS = 64  # of a register tile
WGMMA, PER_ROW, PER_COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def supports(num_heads: int, head_dim: int, rotated: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether so many heads of this size, whose first `rotated` dims turn, can be rotated here."""
    fits = num_heads <= ROWS and num_heads % 8 == 0 and head_dim == rotated and head_dim in (64, 128, 256)
    return fits and jnp.dtype(dtype) == jnp.bfloat16


def _columns(value: jax.Array) -> jax.Array:
    """[N] to [ROWS, N]."""
    return lax.broadcast_in_dim(value, (ROWS, value.shape[0]), [1])


def rotate_heads(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    queries: int,
    keys: int,
    norms: tuple[jax.Array, jax.Array] | None,
    eps: float,
    unit_offset: bool,
    interpret=False,
) -> jax.Array:
    """See `api.rotate_heads`. Raises ValueError unless `supports(queries + keys, ...)`."""
    tokens, _, head_dim = x.shape
    heads, half = queries + keys, head_dim // 2
    if not supports(heads, head_dim, 2 * cos.shape[1], x.dtype):
        raise ValueError(
            f"{heads} heads of {head_dim} {x.dtype.name}, of which {2 * cos.shape[1]} turn, are not supported on GPU: "
            f"bfloat16, up to {ROWS} heads, a multiple of 8, of 64, 128 or 256, which turn whole"
        )
    held = jax.new_ref(x)
    operands = [cos, sin, *(norms or ())]

    def body(cos_ref, sin_ref, *rest):
        weights, (x_ref, tile, ready) = rest[: len(rest) - 3], rest[len(rest) - 3 :]
        token = lax.axis_index("token")
        mine = tile.at[pl.ds(0, heads)]
        plgpu.copy_gmem_to_smem(x_ref.at[token, pl.ds(0, heads)], mine, ready)

        def vector(ref):
            return plgpu.load(ref, layout=PER_COLUMN, optimized=False)

        cosines, sines = _columns(vector(cos_ref.at[token])), _columns(vector(sin_ref.at[token]))
        plgpu.barrier_wait(ready)

        def load(part):
            ref = tile.at[:, pl.ds(part * half, half)]
            return plgpu.load(ref, layout=WGMMA, optimized=False).astype(jnp.float32)

        first, second = load(0), load(1)
        if weights:
            square = jnp.sum(first * first, axis=1) + jnp.sum(second * second, axis=1)
            inverse = lax.broadcast_in_dim(lax.rsqrt(square / head_dim + eps), first.shape, [0])
            row = plgpu.broadcasted_iota(jnp.int32, first.shape, 0, layout=WGMMA)

            def normed(value, part):
                of_query, of_key = (vector(ref.at[pl.ds(part * half, half)]).astype(jnp.float32) for ref in weights)
                weight = jnp.where(row < queries, _columns(of_query), _columns(of_key))
                value = value * inverse
                if unit_offset:
                    return (value * (1.0 + weight)).astype(x.dtype).astype(jnp.float32)
                return (value.astype(x.dtype).astype(jnp.float32) * weight).astype(x.dtype).astype(jnp.float32)

            first, second = normed(first, 0), normed(second, 1)
        tile[:, pl.ds(0, half)] = (first * cosines - second * sines).astype(x.dtype)
        tile[:, pl.ds(half, half)] = (second * cosines + first * sines).astype(x.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, x_ref.at[token, pl.ds(0, heads)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=(tiled((ROWS, head_dim), x.dtype), plgpu.Barrier()),
        grid=(tokens,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        interpret=interpret,
        kernel_name="rotate_heads",
    )(*operands, held)
    return jax.freeze(held)

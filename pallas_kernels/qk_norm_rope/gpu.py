"""Norm and rotation of a token's queries and keys on Hopper GPUs, in Mosaic GPU and in place: values stay where they
are.

A block is a token: its heads come by TMA as a tile of up to 64 rows, are normalized and rotated in registers, and go
back. Bytes: the queries and keys once in and once out. XLA's kernel for the rotation passes the values too, and takes
more than twice as long for thousands of tokens; for fewer than MIN_TOKENS it is the faster one, if there are no norms:
those take two kernels more.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..mosaic import tiled
from .types import Heads

MIN_TOKENS = 128
ROWS = 64  # of a register tile
WGMMA, PER_COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(0)


def supports(qkv: jax.Array, tables: tuple[jax.Array, jax.Array], heads: Heads) -> bool:
    """Whether queries and keys together, and all heads of a token, are made up of tiles of eight rows, and are rotated
    whole. Tiles of four lower, too, but what TMA puts there is not where registers are loaded from."""
    rotating = heads.queries + heads.keys
    fits = rotating <= ROWS and rotating % 8 == 0 == heads.keys % 8
    return fits and 2 * tables[0].shape[1] == heads.dim in (64, 128, 256) and qkv.dtype == jnp.bfloat16


def _columns(value: jax.Array) -> jax.Array:
    """[N] to [ROWS, N]."""
    return lax.broadcast_in_dim(value, (ROWS, value.shape[0]), [1])


def qk_norm_rope(
    qkv: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    weights: tuple[jax.Array, jax.Array] | None,
    heads: Heads,
    *,
    interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.qk_norm_rope`. What it returns are parts of one array, the projection rotated in place, which attention
    joins again without a copy. Raises ValueError unless `supports(qkv, tables, heads)`."""
    rotating, head_dim, half = heads.queries + heads.keys, heads.dim, heads.dim // 2
    if not supports(qkv, tables, heads):
        raise ValueError(
            f"{rotating} heads of {head_dim} {qkv.dtype.name}, of which {2 * tables[0].shape[1]} dims are rotated, are "
            f"not supported on GPU: bfloat16, up to {ROWS} heads, a multiple of 8 for keys and for queries, of 64, "
            "128 or 256, rotated whole"
        )
    x = qkv.reshape(len(qkv), -1, head_dim)
    held = jax.new_ref(x)

    def body(cos_ref, sin_ref, *rest):
        norms, (x_ref, tile, ready) = rest[: len(rest) - 3], rest[len(rest) - 3 :]
        token = lax.axis_index("token")
        mine = tile.at[pl.ds(0, rotating)]
        plgpu.copy_gmem_to_smem(x_ref.at[token, pl.ds(0, rotating)], mine, ready)

        def vector(ref):
            return plgpu.load(ref, layout=PER_COLUMN, optimized=False)

        cosines, sines = _columns(vector(cos_ref.at[token])), _columns(vector(sin_ref.at[token]))
        plgpu.barrier_wait(ready)

        def load(part):
            ref = tile.at[:, pl.ds(part * half, half)]
            return plgpu.load(ref, layout=WGMMA, optimized=False).astype(jnp.float32)

        first, second = load(0), load(1)
        if norms:
            square = jnp.sum(first * first, axis=1) + jnp.sum(second * second, axis=1)
            inverse = lax.broadcast_in_dim(lax.rsqrt(square / head_dim + heads.eps), first.shape, [0])
            row = plgpu.broadcasted_iota(jnp.int32, first.shape, 0, layout=WGMMA)

            def normed(value, part):
                of_query, of_key = (vector(ref.at[pl.ds(part * half, half)]).astype(jnp.float32) for ref in norms)
                weight = jnp.where(row < heads.queries, _columns(of_query), _columns(of_key))
                value = value * inverse
                if heads.unit_offset:
                    return (value * (1.0 + weight)).astype(x.dtype).astype(jnp.float32)
                return (value.astype(x.dtype).astype(jnp.float32) * weight).astype(x.dtype).astype(jnp.float32)

            first, second = normed(first, 0), normed(second, 1)
        tile[:, pl.ds(0, half)] = (first * cosines - second * sines).astype(x.dtype)
        tile[:, pl.ds(half, half)] = (second * cosines + first * sines).astype(x.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, x_ref.at[token, pl.ds(0, rotating)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=(tiled((ROWS, head_dim), x.dtype, span=half), plgpu.Barrier()),
        grid=(len(x),),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        interpret=interpret,
        kernel_name="qk_norm_rope",
    )(*tables, *(weights or ()), held)
    q, k, v = jnp.split(jax.freeze(held), (heads.queries, rotating), axis=1)
    return q, k, v

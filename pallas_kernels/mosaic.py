"""What the Mosaic GPU kernels of several operations share."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def tiled(shape: tuple[int, ...], dtype, span: int | None = None):
    """Shared memory in the layout that TMA writes and wgmma reads. span: columns that are read by themselves; None: all
    are read together."""
    swizzle = plgpu.find_swizzle((span or shape[-1]) * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)

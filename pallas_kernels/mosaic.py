"""What the Mosaic GPU kernels of several operations share."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def tiled(shape: tuple[int, ...], dtype, span: int | None = None, rows: int = 8):
    """Shared memory in the layout that TMA writes and wgmma reads.

    Args:
      span: columns that are read by themselves; None: all are read together.
      rows: of a tile, which must divide those of the array that is copied; wgmma itself reads tiles of 8.
    """
    swizzle = plgpu.find_swizzle((span or shape[-1]) * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((rows, swizzle // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)

"""The device mesh: data-parallel ranks by expert shards by tensor shards."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA, EXPERT, TENSOR = "data", "expert", "tensor"


def make_mesh(data: int = 1, tensor: int = 1, expert: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of shape (data, expert, tensor) over the first of `devices` (all local ones by default).

    The tensor axis is innermost: its shards talk twice a layer, so they should be each other's nearest neighbours.
    The expert axis deals out the experts of mixture-of-experts layers; everything else is replicated along it.

    Raises ValueError when there are too few devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    needed = data * expert * tensor
    if needed > len(devices):
        raise ValueError(
            f"a mesh of data={data} x expert={expert} x tensor={tensor} needs {needed} devices; {len(devices)} exist"
        )
    grid = np.asarray(devices[:needed]).reshape(data, expert, tensor)
    return Mesh(grid, (DATA, EXPERT, TENSOR), axis_types=(AxisType.Auto,) * 3)

"""The device mesh: data-parallel ranks by tensor shards."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA, TENSOR = "data", "tensor"


def make_mesh(data: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of shape (data, tensor) over the first data * tensor of `devices` (all local ones by default).

    Raises ValueError when there are too few devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data * tensor > len(devices):
        raise ValueError(f"a mesh of data={data} x tensor={tensor} needs {data * tensor} devices; {len(devices)} exist")
    grid = np.asarray(devices[: data * tensor]).reshape(data, tensor)
    return Mesh(grid, (DATA, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))

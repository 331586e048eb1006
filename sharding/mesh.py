"""The device mesh: data-parallel ranks by expert shards by tensor shards."""

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

DATA, EXPERT, TENSOR = "data", "expert", "tensor"


def make_mesh(data: int = 1, tensor: int = 1, expert: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of shape (data, expert, tensor) over the first of `devices` (by default all, of every process).

    The tensor axis is innermost: its shards talk twice a layer, so they should be each other's nearest neighbours.
    Devices come in the order of their processes, so that a rank's shards lie in one process where they fit; all of a
    TPU slice are ordered by its links instead. The expert axis deals out the experts of mixture-of-experts layers;
    everything else is replicated along it.

    Raises ValueError when there are too few devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    needed = data * expert * tensor
    if needed > len(devices):
        raise ValueError(
            f"a mesh of data={data} x expert={expert} x tensor={tensor} needs {needed} devices; {len(devices)} exist"
        )
    grid = np.asarray(devices[:needed]).reshape(data, expert, tensor)
    if devices[0].platform == "tpu" and needed == len(devices) > 1:
        grid = mesh_utils.create_device_mesh(grid.shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, (DATA, EXPERT, TENSOR), axis_types=(AxisType.Auto,) * 3)


def spans_processes(mesh: Mesh) -> bool:
    """Whether some of its devices belong to another process than others."""
    return len({device.process_index for device in mesh.devices.flat}) > 1

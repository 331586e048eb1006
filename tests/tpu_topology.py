"""Compiling for TPUs that are not there: libtpu's compiler runs on any machine, given a topology."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
OPTIONS = {"v4": {"chip_config_name": "megacore"}}  # both cores of a chip one device, as JAX has them on such machines

# What libtpu would ask a TPU machine for; and several processes may load it, as none of them holds a chip.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


@contextlib.contextmanager
def compiling_for(
    chip: str, shape: tuple[int, ...], axes: tuple[str, ...], topology_name: str | None = None
) -> Iterator[Mesh]:
    """A mesh of such chips, the first of a topology, under which kernels find the chip; what is compiled is not kept on
    disk, where it could not be read back. Skips the test where libtpu is not installed."""
    pytest.importorskip("libtpu")
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=topology_name or TOPOLOGIES[chip], **OPTIONS.get(chip, {})
    )
    devices = np.array(topology.devices[: int(np.prod(shape))]).reshape(shape)
    mesh = Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))
    before = jax.config.jax_enable_compilation_cache
    try:
        _use_compilation_cache(False)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield mesh
    finally:
        _use_compilation_cache(before)


def _use_compilation_cache(enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # what was decided at first use


_HARMLESS = {"parameter", "tuple", "get-tuple-element", "bitcast", "custom-call"}


def makers_of(hlo: str, shape: tuple[int, ...]) -> list[str]:
    """The instructions of optimized HLO whose result holds an array of `shape` and that are no mere names for one.
    Custom calls count as names: Pallas kernels alias their operand."""
    wanted = f"[{','.join(map(str, shape))}]"
    found = []
    for line in hlo.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?\S+ = (.*?) ([a-z][a-z0-9-]*)\(", line)
        if match and wanted in match[1] and match[2] not in _HARMLESS:
            found.append(line.strip()[:200])
    return found


def kernel_vmem(hlo: str) -> dict[str, int]:
    """Bytes of VMEM that each Pallas kernel takes, by its name."""
    taken = {}
    for line in hlo.splitlines():
        if match := re.match(r"\s*(?:ROOT )?%(\w+?)(?:\.\d+)?(?:\.\w+)* = .* custom-call\(", line):
            scoped = re.search(r'"scoped_memory_configs":\[\{[^]]*?"offset":"(\d+)"', line)
            used = re.search(r'"used_scoped_memory_configs":\[\{[^]]*?"size":"(\d+)"', line)  # from address 0 on
            if scoped and used:
                taken[match[1]] = int(used[1]) - int(scoped[1])
    return taken


def abstract(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array that lies on every chip of the mesh."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

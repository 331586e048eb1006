"""Writes the arrays of a converted checkpoint through Orbax. Import it late: Orbax takes seconds."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxllm.checkpoint.orbax_source import StoredArray

_ARRAYS_AT_ONCE = 4  # TensorStore copies as much as it may before it writes


class _Handler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of NumPy arrays, but for chunks that suit shards and carry checksums, which it does not offer."""

    def __init__(self, arrays: Mapping[str, StoredArray]):
        super().__init__(deepcopy_host_arrays=False)
        self._arrays = arrays

    async def serialize(
        self,
        values: Sequence[np.ndarray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[ocp.future.Future]:
        turn = asyncio.Semaphore(_ARRAYS_AT_ONCE)

        async def write(value: np.ndarray, info: ocp.type_handlers.ParamInfo) -> None:
            await info.await_path_creation()
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": (info.parent_dir / info.name).as_posix()},
                "metadata": self._arrays[info.name].metadata(),
                "store_data_equal_to_fill_value": True,
            }
            async with turn:
                store = await ts.open(spec, create=True)
                await store.write(value, can_reference_source_data_indefinitely=True)

        await asyncio.gather(*(write(value, info) for value, info in zip(values, infos, strict=True)))
        return []


def write_arrays(directory: Path, arrays: Mapping[str, StoredArray], values: Mapping[str, np.ndarray]) -> None:
    """Makes `directory` an Orbax checkpoint of a flat tree: name -> array.

    Args:
      values: of each array, in its `shape`; read while they are written.
    """
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _Handler(arrays)))
    writer = ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=True, use_compression=False, type_handler_registry=registry
        )
    )
    stored = {name: value.T if arrays[name].transposed else value for name, value in values.items()}
    writer.save(directory, args=ocp.args.PyTreeSave(stored))

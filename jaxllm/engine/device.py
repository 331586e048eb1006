"""What lives on the device: weights, caches, the slots' state, the sampler's tables; and the executables run on them.

Every method dispatches and returns before the device has finished.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm.engine.addresses import reserve
from jaxllm.engine.compile import Executables
from jaxllm.engine.executables import (
    SAMPLER_TABLES,
    Forward,
    Lowering,
    MakeTables,
    Pool,
    Sample,
    Stage,
    UpdatePages,
    Upload,
    Wide,
    WriteMasks,
)
from jaxllm.engine.step import SlotState, StepBuffers
from sharding import replicated, sharded_by_rank

WideLogprobs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class Device:
    """The arrays of one engine on its mesh.

    Args:
      mesh: (data, tensor).
      leaves: the model's parameters on the mesh.
      executables: compiled from `lowering`.
    """

    def __init__(self, mesh: Mesh, leaves: list[jax.Array], executables: Executables, lowering: Lowering):
        self.leaves, self.executables, self._lowering = leaves, executables, lowering
        self._by_rank, self._everywhere = sharded_by_rank(mesh), replicated(mesh)
        self._has_graphs = mesh.devices.flat[0].platform == "gpu"
        self._reserved: dict[int, list[jax.Array]] = {}  # by size, see `addresses`
        self.reset()

    def reset(self) -> None:
        """Makes the caches and the slots' state, all zeros; what was there and steps under way are lost."""
        self.caches: list[jax.Array] = []  # the old ones go first
        self.caches = [_zeros(spec) for spec in self._lowering.caches()]
        self._state: SlotState = jax.tree.map(_zeros, self._lowering.state())
        self._history = _zeros(self._lowering.tables()["history"])
        self._packed = _zeros(self._lowering.packed())
        self._buffers: StepBuffers = jax.tree.map(_zeros, self._lowering.buffers())
        self._tables: dict[str, jax.Array] | None = None
        self._masks: jax.Array | None = None

    def forward(self, key: Forward, packed: list[np.ndarray]) -> tuple[StepBuffers, jax.Array | None]:
        """Runs a step's forward pass over each rank's packed array; what it leaves for the sampler, and all hidden rows
        if `key` asks for them."""
        joined = packed[0] if len(packed) == 1 else np.concatenate(packed)
        self._reserve_for(self._packed)
        self._packed = self.executables.get(Stage())(self._packed, joined)
        run = self.executables.get(key)
        self.caches, self._state, self._buffers, self._history, hidden = run(
            self.leaves, self.caches, self._state, self._buffers, self._history, self._packed
        )
        return self._buffers, hidden

    def sample(self, key: Sample, buffers: StepBuffers) -> jax.Array:
        """Samples what a forward pass has left; int32[rows, columns] as `read_rank` reads it."""
        extra = tuple(self._sampler_tables().values()) if key.variant.adjust else None
        masks = self._mask_table() if key.variant.masked else None
        run = self.executables.get(key)
        self._history, output = run(self._head, buffers.last_hidden, buffers.rows, self._history, extra, masks)
        self._reserve_for(output)
        return output

    @property
    def _head(self) -> list[jax.Array]:
        return [self.leaves[at] for at in self._lowering.shape.head]

    def _reserve_for(self, array: jax.Array) -> None:
        """Makes room for arrays of this size to come and go, if there is none yet."""
        if self._has_graphs and array.nbytes not in self._reserved:
            self._reserved[array.nbytes] = reserve(array.addressable_shards[0].data.nbytes, self._everywhere)

    def wide(self, k: int, hidden: jax.Array, index: np.ndarray, targets: np.ndarray) -> WideLogprobs:
        """Logprobs of `targets` and of the k most likely tokens at WIDE_ROWS rows `index` of `hidden`."""
        run = self.executables.get(Wide(hidden.shape[0] // self._lowering.ranks, k))
        index_array, target_array = jax.device_put((index, targets), self._everywhere)
        return run(self._head, hidden, index_array, target_array)

    def pool(self, last_hidden: jax.Array, index: np.ndarray) -> jax.Array:
        """float32[POOL_ROWS, embed], rows `index` of `last_hidden`: a copy, since the next step takes the buffer."""
        return self.executables.get(Pool())(last_hidden, jax.device_put(index, self._everywhere))

    def update_pages(self, block: np.ndarray) -> None:
        """block: int32[ranks, G, MANY_UPDATES, 3], page updates beyond those that travel with a step."""
        updates = jax.device_put(block.reshape(-1, *block.shape[2:]), self._by_rank)
        page_tables = self.executables.get(UpdatePages())(self._state.page_tables, updates)
        self._state = dataclasses.replace(self._state, page_tables=page_tables)

    def upload(self, table: str, slot: int, row: np.ndarray) -> None:
        """Writes one slot's row of a table: "history" or one of SAMPLER_TABLES; slots count over all ranks."""
        slot_array, row_array = jax.device_put((np.int32(slot), row), self._everywhere)
        run = self.executables.get(Upload(table))
        if table == "history":
            self._history = run(self._history, slot_array, row_array)
        else:
            tables = self._sampler_tables()
            tables[table] = run(tables[table], slot_array, row_array)

    def write_masks(self, slots: np.ndarray, words: np.ndarray) -> None:
        """Writes grammar masks: slots int32[ranks, M], those past the last are dropped; words int32[ranks, M, W]."""
        block = (slots.reshape(-1), words.reshape(-1, words.shape[2]))
        slots_array, words_array = jax.device_put(block, self._by_rank)
        run = self.executables.get(WriteMasks(slots.shape[1]))
        self._masks = run(self._mask_table(), slots_array, words_array)

    def _mask_table(self) -> jax.Array:
        """Made when the first request under a grammar samples."""
        if self._masks is None:
            spec = self._lowering.masks(self._lowering.plan.scheduler.max_num_seqs)
            self._masks = jax.device_put(np.zeros(spec.shape, spec.dtype), spec.sharding)
        return self._masks

    def _sampler_tables(self) -> dict[str, jax.Array]:
        """Made when the first request asks: most never do."""
        if self._tables is None:
            self._tables = dict(zip(SAMPLER_TABLES, self.executables.get(MakeTables())(), strict=True))
        return self._tables

    def rehearse(self, keys: Iterable[Any], idle: list[np.ndarray]) -> None:
        """Runs those of `keys` that are compiled twice, on no rows: an executable's first runs load its kernels and
        record its CUDA graph, which no request should wait for.

        idle: each rank's packed array without a row.
        """
        ready = [key for key in keys if self.executables.ready(key)]
        steps = [key for key in ready if isinstance(key, Forward)]
        for _ in range(2 if steps else 0):
            for step in steps:
                buffers, _ = self.forward(step, idle)
            for key in ready:  # the large tables are made for the first request that needs them
                if isinstance(key, WriteMasks):
                    masks = self._lowering.masks(key.num_masks)
                    words = np.zeros((self._lowering.ranks, key.num_masks, masks.shape[1]), np.int32)
                    self.write_masks(
                        np.full(words.shape[:2], self._lowering.plan.scheduler.max_num_seqs, np.int32), words
                    )
                elif isinstance(key, Sample) and not key.variant.adjust:
                    jax.block_until_ready(self.sample(key, buffers))

    def replace_weights(self, leaves: list[jax.Array]) -> None:
        """New parameters of the same shapes and dtypes, without recompiling. Raises ValueError if they differ."""
        for old, new in zip(self.leaves, leaves, strict=True):
            if old.shape != new.shape or old.dtype != new.dtype:
                raise ValueError(f"a parameter of {old.shape} {old.dtype} cannot become {new.shape} {new.dtype}")
        self.leaves = leaves


def _zeros(spec: Any) -> jax.Array:
    return _make_zeros(spec.shape, spec.dtype, spec.sharding)()


@functools.cache
def _make_zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[[], jax.Array]:
    """Compiled once for all layers alike."""
    return jax.jit(lambda: jax.numpy.zeros(shape, dtype), out_shardings=sharding)

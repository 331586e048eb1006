"""What lives on the device: weights, caches, the slots' state, the sampler's tables; and the executables run on them.

Launches are dispatched and return before the device has finished; all they take is the host's, so that other processes
can repeat them (`jaxllm.engine.shared_device`).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxllm.engine.addresses import reserve
from jaxllm.engine.compile import Executables, Key
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
from pallas_kernels.all_reduce_rms_norm import open_memory
from sharding import TENSOR, place, replicated, sharded_by_rank, spans_processes

WideLogprobs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def begin_read(array: jax.Array) -> None:
    """Begins the copy to the host of what `Device.read` will be asked for. On a CPU there is nothing to copy, and JAX
    would take the GIL once the array is there: in a program that is ending, that aborts it."""
    if jax.default_backend() != "cpu":
        array.copy_to_host_async()


class Device:
    """The arrays of one engine on its mesh.

    Args:
      mesh: (data, tensor).
      leaves: the model's parameters on the mesh.
      executables: compiled from `lowering`.
    """

    def __init__(self, mesh: Mesh, leaves: list[jax.Array], executables: Executables, lowering: Lowering):
        self.leaves, self.executables, self._lowering = leaves, executables, lowering
        self._mesh, self._by_rank, self._everywhere = mesh, sharded_by_rank(mesh), replicated(mesh)
        self._is_shared = spans_processes(mesh)
        self._has_graphs = mesh.devices.flat[0].platform == "gpu"
        self._reserved: dict[int, list[jax.Array]] = {}  # by size, see `addresses`
        self._make_arrays()

    def reset(self) -> None:
        """Makes the caches and the slots' state anew, all zeros; what was there and steps under way are lost."""
        self._make_arrays()

    def _make_arrays(self) -> None:
        self.caches: list[jax.Array] = []  # the old ones go first
        self.caches = [_zeros(spec) for spec in self._lowering.caches()]
        self._state: SlotState = jax.tree.map(_zeros, self._lowering.state())
        self._history = _zeros(self._lowering.tables()["history"])
        self._packed = _zeros(self._lowering.packed())
        self._staged: np.ndarray | None = None  # what `_packed` holds
        self._buffers: StepBuffers = jax.tree.map(_zeros, self._lowering.buffers())
        self._peers: jax.Array | None = None
        if self._lowering.peers() is not None:
            self._memory, self._peers = open_memory(self._mesh, TENSOR, self._lowering.hidden_size)
        self._all_hidden: jax.Array | None = None
        self._tables: dict[str, jax.Array] | None = None
        self._masks: jax.Array | None = None

    # Compiling

    def prepare(self, keys: Sequence[Key]) -> None:
        """Queues executables to be compiled."""
        self.executables.prepare(keys)

    def compile(self, keys: Sequence[Key]) -> None:
        """Compiles executables and waits for them; what is compiled from then on counts as late."""
        self.executables.prepare(keys)
        self.executables.wait()
        self.executables.seal()

    # Launching

    def forward(self, key: Forward, packed: list[np.ndarray]) -> None:
        """Runs a step's forward pass over each rank's packed array, which must not change afterwards. What it leaves
        for the sampler, and all hidden rows if `key` asks for them, stay here until the next one."""
        self._stage(packed[0] if len(packed) == 1 else np.concatenate(packed))
        run = self.executables.get(key)
        self._all_hidden = None  # before the next ones are allocated
        self.caches, self._state, self._buffers, self._history, self._all_hidden = run(
            self.leaves, self.caches, self._state, self._buffers, self._history, self._packed, self._peers
        )

    def _stage(self, packed: np.ndarray) -> None:
        """Brings a step's metadata to the device, unless it is the last step's: decodes of few rows, whose tokens and
        lengths the device knows, say nothing new until one of them needs a page."""
        if self._staged is not None and np.array_equal(packed, self._staged):
            return
        self._reserve_for(self._packed)
        placed = place(packed, self._by_rank) if self._is_shared else packed
        self._staged = None
        self._packed = self.executables.get(Stage())(self._packed, placed)
        self._staged = packed

    def sample(self, key: Sample) -> jax.Array:
        """Samples what the last forward pass has left; int32[rows, columns] as `read_rank` reads it."""
        extra = tuple(self._sampler_tables().values()) if key.variant.adjust else None
        masks = self._mask_table() if key.variant.masked else None
        run = self.executables.get(key)
        self._history, output = run(
            self._head, self._buffers.last_hidden, self._buffers.rows, self._history, extra, masks
        )
        self._reserve_for(output)
        return output

    @property
    def _head(self) -> list[jax.Array]:
        return [self.leaves[at] for at in self._lowering.shape.head]

    def _reserve_for(self, array: jax.Array | np.ndarray) -> None:
        """Makes room for arrays of this size to come and go, if there is none yet; one of the host's is to be split by
        rank."""
        if self._has_graphs and array.nbytes not in self._reserved:
            if isinstance(array, np.ndarray):
                part = array.nbytes // self._lowering.ranks
            else:
                part = array.addressable_shards[0].data.nbytes
            self._reserved[array.nbytes] = reserve(part, self._everywhere)

    def wide(self, k: int, of_last: bool, index: np.ndarray, targets: np.ndarray) -> WideLogprobs:
        """Logprobs of `targets` and of the k most likely tokens at WIDE_ROWS rows `index` of what the last forward pass
        has left: the last hidden row of each row (by rank and row), or all hidden rows (by rank and token)."""
        hidden = self._buffers.last_hidden if of_last else self._all_hidden
        assert hidden is not None, "the last forward pass was not asked for all hidden rows"
        run = self.executables.get(Wide(hidden.shape[0] // self._lowering.ranks, k))
        return run(self._head, hidden, *self._placed(self._everywhere, index, targets))

    def pool(self, index: np.ndarray) -> jax.Array:
        """float32[POOL_ROWS, embed], rows `index` of the last hidden rows: a copy, since the next step takes them."""
        return self.executables.get(Pool())(self._buffers.last_hidden, *self._placed(self._everywhere, index))

    def update_pages(self, block: np.ndarray) -> None:
        """block: int32[ranks, G, MANY_UPDATES, 3], page updates beyond those that travel with a step."""
        updates = place(block.reshape(-1, *block.shape[2:]), self._by_rank)
        page_tables = self.executables.get(UpdatePages())(self._state.page_tables, updates)
        self._state = dataclasses.replace(self._state, page_tables=page_tables)

    def upload(self, table: str, slot: int, row: np.ndarray) -> None:
        """Writes one slot's row of a table: "history" or one of SAMPLER_TABLES; slots count over all ranks."""
        slot_array, row_array = self._placed(self._everywhere, np.asarray(slot, np.int32), row)
        run = self.executables.get(Upload(table))
        if table == "history":
            self._history = run(self._history, slot_array, row_array)
        else:
            tables = self._sampler_tables()
            tables[table] = run(tables[table], slot_array, row_array)

    def write_masks(self, slots: np.ndarray, words: np.ndarray) -> None:
        """Writes grammar masks: slots int32[ranks, M], those past the last are dropped; words int32[ranks, M, W].
        Neither may change afterwards."""
        flat = slots.reshape(-1), words.reshape(-1, words.shape[2])
        table = self._mask_table()
        for array in flat:
            self._reserve_for(array)
        run = self.executables.get(WriteMasks(slots.shape[1]))
        self._masks = run(table, *(place(array, self._by_rank) if self._is_shared else array for array in flat))

    def _mask_table(self) -> jax.Array:
        """Made when the first request under a grammar samples."""
        if self._masks is None:
            spec = self._lowering.masks(self._lowering.plan.scheduler.max_num_seqs)
            self._masks = place(np.zeros(spec.shape, spec.dtype), spec.sharding)
        return self._masks

    def _sampler_tables(self) -> dict[str, jax.Array]:
        """Made when the first request asks: most never do."""
        if self._tables is None:
            self._tables = dict(zip(SAMPLER_TABLES, self.executables.get(MakeTables())(), strict=True))
        return self._tables

    def _placed(self, sharding: NamedSharding, *values: np.ndarray) -> list[jax.Array]:
        if not self._is_shared:
            return jax.device_put(list(values), sharding)  # in one go
        return [place(value, sharding) for value in values]

    # Reading

    def read(self, *arrays: jax.Array) -> list[np.ndarray]:
        """Waits for what launches have returned. Raises what the device raised."""
        return [np.asarray(array) for array in arrays]

    def drain(self) -> None:
        """Waits for everything under way, whatever becomes of it."""
        for array in (self._history, *jax.tree.leaves((self._state, self._buffers)), *self.caches):
            with contextlib.suppress(Exception):  # it has failed, or is lost to a step that has
                array.block_until_ready()

    def watch(self, on_lost: Callable[[Exception], None]) -> None:
        """Has it called, by another thread, once the device is lost while nobody uses it; one that is this process's
        own never is."""

    def close(self, reason: str | None = None) -> None:
        """Stops compiling. `reason`: why, if it is not as it should be, for other processes to know."""
        self.executables.close()

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

"""Steps traced and lowered in processes beside the engine's, several at a time.

Mosaic GPU lowers kernels in Python, a second or two for each rung of a step, and threads do that one after another
under the GIL. `python -m jaxllm.engine.lowering_process IN OUT` reads a `_Task` and then keys from the pipe IN, and
answers each on OUT with the step as `jax.export` leaves it, for a GPU that it does not touch. To take that over costs
the engine's process hundredths of a second. Both ends are this program, nobody else has the pipes: they carry pickles.
"""

import contextlib
import dataclasses
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

import jax
import numpy as np
from jax import export
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.engine.executables import FORWARD_DONATES, FORWARD_RETURNS, Forward, Lowering
from jaxllm.engine.resolve import EnginePlan
from jaxllm.engine.step import StepShape

logger = logging.getLogger(__name__)

START_SECONDS = 120.0  # for a process to have imported JAX
IDLE_SECONDS = 60.0  # after which a process ends by itself
_KERNEL = "mosaic_gpu_v2"  # a custom call that `jax.export` must be told to let pass
# Of JAX's settings, those that a program may have changed and that decide what is traced.
_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_threefry_partitionable",
    "jax_use_shardy_partitioner",
)


@dataclasses.dataclass(frozen=True)
class _Task:
    """What a process needs to build its `Lowering`; `settings` are JAX's, by name."""

    shape: StepShape
    plan: EnginePlan
    leaves: list[tuple[tuple[int, ...], Any, P]]  # shape, dtype, place on the mesh
    mesh: AbstractMesh
    platform: str
    settings: dict[str, Any]

    def lowering(self) -> "Exporting":
        """For a process whose JAX has not begun. Kernels that sum over devices name them, and an abstract mesh has
        none: this process' CPU stands for as many devices, of the same ids."""
        mesh: Any = self.mesh
        if self.shape.stream_axis is not None:
            jax.config.update("jax_num_cpu_devices", self.mesh.size)
            devices = np.asarray(jax.devices("cpu")).reshape(self.mesh.axis_sizes)
            mesh = Mesh(devices, self.mesh.axis_names, axis_types=self.mesh.axis_types)
        leaves = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)) for shape, dtype, spec in self.leaves
        ]
        return Exporting(self.shape, self.plan, leaves, mesh, self.platform)


@dataclasses.dataclass(frozen=True)
class _Program:
    """A lowered step: its leaves to its results' leaves."""

    exported: export.Exported
    out_tree: Any


class Exporting(Lowering):
    """Lowers for a platform that need not be there, and names no places of arguments: `shard_map` does.

    Args:
      mesh: may be abstract.
      platform: a name of `jax.export`, "cuda" or "cpu".
    """

    def __init__(
        self, shape: StepShape, plan: EnginePlan, leaves: list[jax.ShapeDtypeStruct], mesh: Any, platform: str
    ):
        super().__init__(shape, plan, leaves, mesh)
        self._platform = platform

    def _sharded(self, *arguments: Any, **options: Any):
        return _Export(super()._sharded(*arguments, **options), self._platform)


@dataclasses.dataclass(frozen=True)
class _Export:
    """A jitted function whose `lower` exports it."""

    function: Any
    platform: str

    def lower(self, *arguments: Any) -> _Program:
        leaves, tree = jax.tree.flatten(arguments)
        out_trees = []

        def flat(*leaves: jax.Array) -> list[jax.Array]:
            out, out_tree = jax.tree.flatten(self.function(*jax.tree.unflatten(tree, leaves)))
            out_trees.append(out_tree)
            return out

        exported = export.export(
            jax.jit(flat, keep_unused=True),
            platforms=(self.platform,),
            disabled_checks=[export.DisabledSafetyCheck.custom_call(_KERNEL)],
        )(*(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves))
        return _Program(dataclasses.replace(exported, _get_vjp=None), out_trees[0])  # a closure, which has no pickle


class _Process:
    """A process as its owner sees it; not for several threads at once. It ends with this object at the latest."""

    def __init__(self, task: bytes):
        """Starts it. Raises OSError or EOFError if it does not come up."""
        keys, self._keys = Pipe(duplex=False)
        self._programs, programs = Pipe(duplex=False)
        with keys, programs:
            theirs = [keys.fileno(), programs.fileno()]
            process = subprocess.Popen(
                [sys.executable, "-m", "jaxllm.engine.lowering_process", *map(str, theirs)],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # Ctrl-C is its owner's to answer
            )
        self.close = weakref.finalize(self, _end, process, self._keys, self._programs)
        self._keys.send_bytes(task)
        if not self._programs.poll(START_SECONDS):
            raise TimeoutError(f"no answer in {START_SECONDS:g} s")
        self._programs.recv_bytes()

    def lower(self, key: Forward) -> _Program | str:
        """The program, or what was wrong. Raises OSError or EOFError if the process has ended."""
        self._keys.send_bytes(pickle.dumps(key))
        return pickle.loads(self._programs.recv_bytes())


def _end(process: subprocess.Popen, *connections: Connection) -> None:
    process.kill()
    process.wait()
    for connection in connections:
        connection.close()


class SharedLowering(Lowering):
    """Lowers steps in this process and in others, whichever is free first, and all else in this one.

    Others are started as they are needed, and only add speed: what they fail at is lowered here.

    Args:
      processes: how many others there may be.

    Attributes:
      num_shared: steps that other processes have lowered.
    """

    def __init__(
        self, shape: StepShape, plan: EnginePlan, leaves: list[jax.ShapeDtypeStruct], mesh: Mesh, processes: int
    ):
        super().__init__(shape, plan, leaves, mesh)
        self.num_shared = 0
        self._room, self._starting = processes, threading.Lock()
        self._free: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()  # None: this process
        self._free.put(None)
        self._task = _pickled_task(shape, plan, leaves, mesh) if processes else b""

    def __call__(self, key: Any):
        """Traces and lowers one executable."""
        if not isinstance(key, Forward):
            return super().__call__(key)
        while True:
            process = self._take()
            if process is None:
                try:
                    return super().__call__(key)
                finally:
                    self._free.put(None)
            try:
                program = process.lower(key)
            except (OSError, EOFError):  # killed, or idle for long
                logger.debug("a process for lowering has ended")
                process.close()
                continue
            self._free.put(process)
            if isinstance(program, str):
                logger.warning("%s is lowered again, after another process: %s", key, program)
                return super().__call__(key)
            self.num_shared += 1
            with self._turn:
                return self._around(program).lower(*self.forward_arguments())

    def _take(self) -> _Process | None:
        with contextlib.suppress(queue.Empty):
            return self._free.get_nowait()
        with self._starting:
            if self._room:
                self._room -= 1
                threading.Thread(target=self._start, daemon=True).start()
        return self._free.get()

    def _start(self) -> None:
        try:
            self._free.put(_Process(self._task))
        except (OSError, EOFError) as error:
            logger.warning("a process for lowering does not start: %s", error)

    def _around(self, program: _Program):
        """The jitted function that `_forward` would have lowered, around the program."""

        def run(*arguments: Any):
            return jax.tree.unflatten(program.out_tree, program.exported.call(*jax.tree.leaves(arguments)))

        places = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), FORWARD_RETURNS, is_leaf=_is_spec)
        run.__name__ = "forward"  # in profiles
        return jax.jit(run, donate_argnums=FORWARD_DONATES, keep_unused=True, out_shardings=places)


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)


def _pickled_task(shape: StepShape, plan: EnginePlan, leaves: Sequence[jax.ShapeDtypeStruct], mesh: Mesh) -> bytes:
    platform = mesh.devices.flat[0].platform
    task = _Task(
        shape,
        plan,
        [(leaf.shape, leaf.dtype, leaf.sharding.spec) for leaf in leaves],
        mesh.abstract_mesh,
        {"gpu": "cuda"}.get(platform, platform),
        {name: jax.config.values[name] for name in _SETTINGS},
    )
    return pickle.dumps(task)


def main() -> None:
    """Answers until the owner is gone, or has nothing to ask for IDLE_SECONDS."""
    keys, programs = Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False)
    with contextlib.suppress(EOFError, OSError):
        task: _Task = pickle.loads(keys.recv_bytes())
        for name, value in task.settings.items():
            if jax.config.values[name] != value:
                jax.config.update(name, value)
        lowering = task.lowering()
        programs.send_bytes(b"ready")
        while keys.poll(IDLE_SECONDS):
            key = pickle.loads(keys.recv_bytes())
            try:
                answer = lowering(key)
            except Exception as error:  # the owner lowers it itself, and sees the whole of it
                answer = f"{type(error).__name__}: {error}"
            programs.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    # As the owner knows this module: by another name its classes could not be unpickled there.
    from jaxllm.engine import lowering_process

    lowering_process.main()

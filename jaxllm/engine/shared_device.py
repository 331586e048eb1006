"""A device whose mesh spans processes: what process 0 launches, the others launch too, in the same order.

XLA's collectives meet only if every process runs the same executables in the same order. So process 0 alone schedules;
each launch goes to the others with what the host knows of it, and they repeat it on their own shards. Only process 0
reads.
"""

import logging
from collections.abc import Callable
from typing import Any, Concatenate

import jax
import numpy as np

from jaxllm.engine.device import Device
from jaxllm.engine.group import Follower, Leader

logger = logging.getLogger(__name__)

# What is repeated, and of it what process 0 waits for.
REPEATED = (
    "prepare", "compile", "forward", "sample", "wide", "pool", "update_pages", "upload", "write_masks", "reset",
)  # fmt: skip
ANSWERED = ("compile", "reset")
RESET_SECONDS = 60.0  # for what is under way in all processes to end or fail, after a step has failed


def _repeated[**P, R](
    launch: Callable[Concatenate["SharedDevice", P], R],
) -> Callable[Concatenate["SharedDevice", P], R]:
    name = launch.__name__
    assert name in REPEATED

    def run(self: "SharedDevice", *args: P.args, **kwargs: P.kwargs) -> R:
        assert not kwargs, "what other processes repeat travels by position"
        with self.group.launching():
            self.group.call(name, args)
            return launch(self, *args, **kwargs)

    return run


class SharedDevice(Device):
    """Process 0's. Every method raises EngineDeadError once a process is lost.

    Args:
      group: the other processes.
      others: as for `Device`.
    """

    def __init__(self, group: Leader, *others: Any):
        super().__init__(*others)
        self.group = group

    prepare = _repeated(Device.prepare)
    forward = _repeated(Device.forward)
    sample = _repeated(Device.sample)
    wide = _repeated(Device.wide)
    pool = _repeated(Device.pool)
    update_pages = _repeated(Device.update_pages)
    upload = _repeated(Device.upload)
    write_masks = _repeated(Device.write_masks)

    def compile(self, keys) -> None:
        """As `Device.compile`, in all processes."""
        self.group.call("compile", (keys,))
        super().compile(keys)
        self.group.collect()

    def reset(self) -> None:
        """As `Device.reset`, in all processes; raises EngineDeadError if one of them still waits for the others in a
        step that has failed here."""
        self.group.call("reset", ())
        self.group.wait(self.drain)
        super().reset()
        self.group.collect(RESET_SECONDS)

    def read(self, *arrays: jax.Array) -> list[np.ndarray]:
        """As `Device.read`."""
        return self.group.wait(lambda: [np.asarray(array) for array in arrays])

    def replace_weights(self, leaves: list[jax.Array]) -> None:
        """Is refused: other processes would go on with the old ones."""
        raise NotImplementedError("weights of several processes cannot be replaced")

    def watch(self, on_lost: Callable[[Exception], None]) -> None:
        """As `Device.watch`: when a process is lost."""
        self.group.tell(on_lost)

    def close(self, reason: str | None = None) -> None:
        """Ends the other processes, too."""
        super().close(reason)
        self.group.close(reason)


def follow(group: Follower, device: Device) -> None:
    """Repeats what process 0 launches, until it closes the engine. Raises EngineDeadError when it is lost."""
    failed = False
    for name, args in group.calls():
        if failed and name not in ANSWERED:
            continue  # the step has failed, and with it what would come of the next ones
        try:
            with group.launching():
                assert name in REPEATED, name
                if name == "reset":
                    device.drain()
                getattr(device, name)(*args)
        except Exception as error:
            logger.exception("%s", name)
            failed = failed or name not in ANSWERED
            group.answer(f"{type(error).__name__}: {error}", of_launch=name not in ANSWERED)
            continue
        if name in ANSWERED:
            failed = failed and name != "reset"
            group.answer(None)
    device.close()

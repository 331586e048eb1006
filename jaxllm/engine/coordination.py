"""JAX's coordination service in a process of its own, which outlives process 0 by a little.

`jax.distributed.initialize` starts the service in process 0. When that is killed, the service goes with it, and JAX
aborts every other process within milliseconds (SIGABRT), naming nobody, often before `group` has ended it with an error
that says who is lost. Here process 0 has a child for it.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

GRACE_SECONDS = 30.0  # for the other processes to end by themselves once process 0 is gone


class Service:
    """What `jaxlib`'s `get_distributed_runtime_service` returns, as far as JAX uses it.

    Args: that function's. Raises RuntimeError if the service does not start.
    """

    def __init__(self, *args: Any, **options: Any):
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # whoever reads process 0's to its end must not wait for this one
            text=True,
            start_new_session=True,  # Ctrl-C is for process 0, which tells it
        )
        self._say(json.dumps([args, options]))
        assert self._child.stdout is not None
        answer = self._child.stdout.readline().strip()
        if answer != "ready":
            self._child.kill()
            self._child.wait()
            raise RuntimeError(f"JAX's coordination service does not start: {answer or 'its process has ended'}")

    def _say(self, line: str) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()

    def shutdown(self) -> None:
        """Ends it, as JAX does when all is over."""
        self._say("shutdown")
        try:
            self._child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """In it `jax.distributed.initialize` starts its service as a `Service`: it takes no service, and no address of one
    that is there, from process 0."""
    from jax._src import distributed

    usual = distributed._jax.get_distributed_runtime_service
    distributed._jax.get_distributed_runtime_service = Service
    try:
        yield
    finally:
        distributed._jax.get_distributed_runtime_service = usual


def main() -> None:
    """Serves until it is told to end, or its parent has been gone for GRACE_SECONDS."""
    from jaxlib import _jax

    args, options = json.loads(sys.stdin.readline())
    try:
        service = _jax.get_distributed_runtime_service(*args, **options)
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return
    print("ready", flush=True)
    if sys.stdin.readline() == "shutdown\n":
        service.shutdown()
    else:
        time.sleep(GRACE_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    main()

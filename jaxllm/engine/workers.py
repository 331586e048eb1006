"""Threads for compilations. They are daemons: a program that ends waits for what they do, not for what is queued, which
an executor of `concurrent.futures` would do first."""

import atexit
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

_Work = tuple[Future, Callable[[], Any]]
_all: "weakref.WeakSet[Workers]" = weakref.WeakSet()


class Workers:
    """Does what is submitted, in order.

    Args:
      num_threads: how many do it at once.
    """

    def __init__(self, num_threads: int):
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._submitted: weakref.WeakSet[Future] = weakref.WeakSet()
        self._threads = [
            threading.Thread(target=_work, args=(self._queue,), name=f"compile_{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        self._end = weakref.finalize(self, _end, self._queue, num_threads)
        _all.add(self)

    def submit(self, function: Callable[[], Any]) -> Future:
        """What will hold its result, or what it raised; it can be cancelled until it is begun."""
        future: Future = Future()
        self._submitted.add(future)
        self._queue.put((future, function))
        return future

    def close(self) -> None:
        """Cancels what has not begun; what has ends by itself."""
        for future in list(self._submitted):
            future.cancel()
        self._end()

    def join(self) -> None:
        """Waits for what has begun, after `close`."""
        for thread in self._threads:
            thread.join()


def _work(queue: "SimpleQueue[_Work | None]") -> None:
    """A thread's life. Between two functions it holds nothing, so that its owner can be forgotten."""
    while (work := queue.get()) is not None:
        future, function = work
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
        del work, future, function


def _end(queue: "SimpleQueue[_Work | None]", num_threads: int) -> None:
    for _ in range(num_threads):
        queue.put(None)


@atexit.register
def _close_all() -> None:
    """XLA must not be torn down under a compilation: JAX does so at its own exit, which comes later than this one."""
    for workers in list(_all):
        workers.close()
    for workers in list(_all):
        workers.join()

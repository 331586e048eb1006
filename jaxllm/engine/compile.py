"""Executables by key, compiled ahead of time in parallel, most needed first, and kept on disk for the next start."""

import functools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax

from jaxllm.engine import platform
from jaxllm.engine.executable_store import ExecutableStore
from jaxllm.engine.workers import Workers
from jaxllm.errors import ConfigError

logger = logging.getLogger(__name__)

Key = Hashable


_cached = threading.local()  # .hit: whether this thread's last compilation came from JAX's cache


def _note(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _cached.hit = True


jax.monitoring.register_event_listener(_note)


def use_compilation_cache(directory: Path) -> None:
    """Keeps every executable of this process in `directory`. Raises ConfigError if it cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"compilation_cache_dir={str(directory)!r}: must be a directory: {error}") from error
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Executables:
    """Compiled functions by key.

    `lower(key)` traces; it and the compilation run on worker threads. XLA compiles without the GIL, tracing holds it:
    `lower` should let one thread trace at a time, so that the first executables compile while others are traced. What
    is asked for first is compiled first.

    Args:
      lower: traces and lowers the executable of a key.
      store: where executables are looked for first and kept, with the devices they run on; None: only in JAX's cache.

    Attributes:
      num_late: compilations that a caller of `get` had to start after `seal`: what serving should never meet.
      num_restored: executables that came from the store.
      num_waiting: callers of `get` that wait for a compilation right now.
    """

    def __init__(
        self,
        lower: Callable[[Any], Any],
        num_threads: int = 2,
        store: tuple[ExecutableStore, Sequence[jax.Device]] | None = None,
    ):
        self._lower, self._store = lower, store
        self._workers = Workers(num_threads)
        self._futures: dict[Key, Future] = {}
        self._lock = threading.Lock()
        self._sealed = False
        self.num_late = self.num_restored = self.num_waiting = 0
        self.seconds: dict[Key, float] = {}

    def _compile(self, key: Key) -> Any:
        begin = time.perf_counter()
        compiled = None
        if self._store is not None:
            store, devices = self._store
            compiled = store.load(key, devices)
        if compiled is not None:
            self.num_restored += 1
        else:
            lowered = self._lower(key)
            _cached.hit = False
            compiled = lowered.compile()
            # What JAX has read from its own cache is not written again: on CPU such a copy lacks its functions.
            if self._store is not None and not _cached.hit:
                store.save(key, compiled)
        self.seconds[key] = time.perf_counter() - begin
        platform.trim_memory()
        logger.debug("compiled %s in %.2f s", key, self.seconds[key])
        return compiled

    def prepare(self, keys: Iterable[Key]) -> None:
        """Queues what is not queued yet."""
        with self._lock:
            for key in keys:
                if key not in self._futures:
                    self._futures[key] = self._workers.submit(functools.partial(self._compile, key))

    def ready(self, key: Key) -> bool:
        """Whether `get` would return at once."""
        future = self._futures.get(key)
        return future is not None and future.done() and future.exception() is None

    def get(self, key: Key) -> Any:
        """The compiled function, waiting for it or compiling it now. Raises what its compilation raised."""
        future = self._futures.get(key)
        if future is not None and future.done():
            return future.result()
        if future is None and self._sealed:
            self.num_late += 1
            logger.warning("compiling %s while serving", key)
        self.num_waiting += 1
        try:
            if future is None or future.cancel():  # it jumps the queue: somebody waits for it
                future = self._futures[key] = Future()
                try:
                    future.set_result(self._compile(key))
                except Exception as error:
                    future.set_exception(error)
            return future.result()
        finally:
            self.num_waiting -= 1

    def first_ready[K: Hashable](self, keys: list[K]) -> K:
        """The first of `keys` that is ready; if none is, the first that is being compiled, or simply the first."""
        for key in keys:
            if self.ready(key):
                return key
        return next((key for key in keys if key in self._futures), keys[0])

    def wait(self) -> None:
        """Blocks until everything queued is compiled; raises the first failure."""
        for future in list(self._futures.values()):
            future.result()

    def seal(self) -> None:
        """From now on compilations count as late."""
        self._sealed = True

    def close(self) -> None:
        """Drops what has not started; compilations under way end by themselves."""
        self._workers.close()

"""The processes that run one engine together: how they meet, agree, and notice that one of them is lost.

`jax.distributed` joins their devices; beside it process 0 holds a TCP connection with each other process. A device that
waits for a lost process's part waits forever, or its process is aborted: so every process shows signs of life, and
where they stay out the engine's thread is woken with an error that names the process. If the thread is stuck in a
launch by then, its process ends.
"""

import atexit
import concurrent.futures
import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.engine import calls, coordination, platform
from jaxllm.engine.peer import Peer, listen, meet, visit
from jaxllm.errors import ConfigError, EngineDeadError

logger = logging.getLogger(__name__)

JOIN_SECONDS = 300  # for all processes to have been started
START_SECONDS = 3600.0  # for each step of a start, all alive: reading weights, compiling
STUCK_SECONDS = 5.0  # after a loss, in a launch that does not return
STALLED_SECONDS = 600.0  # that process 0 waits for a step while all are alive; a compilation may be among it
FAILED_SECONDS = 20.0  # in which a launch that has failed in one process fails in process 0 too, or the group ends

# Options that may differ: they say who a process is, or matter to it alone, or to process 0.
_OWN_OPTIONS = (
    "process_id", "num_processes", "coordinator_address", "compilation_cache_dir", "engine_process", "warm_up", "seed",
)  # fmt: skip


class Group:
    """What all processes have in common. Messages are (kind, content), see `calls.encode`.

    Attributes:
      process: this one's number.
      size: how many there are.
    """

    def __init__(self, process: int, size: int, peers: list[Peer], timeout: float):
        self.process, self.size = process, size
        self._peers, self._timeout = peers, timeout
        self._closed = False
        self._error: str | None = None  # that a process is lost
        self._reason: str | None = None  # for which this one has left
        self._lost: concurrent.futures.Future = concurrent.futures.Future()  # fails when a process is lost
        self._lock = threading.Lock()
        self._inside: float | None = None  # since when the engine's thread is in a launch
        for peer in peers:
            threading.Thread(target=self._listen, args=(peer,), name=f"from {peer.name}", daemon=True).start()
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    # Agreement

    def exchange(self, value: Any) -> list[Any]:
        """Every process's value, in their order; all have to call it at the same point."""
        raise NotImplementedError

    def agree_on_options(self, config: EngineConfig) -> None:
        """Raises ConfigError, in all processes, for an option that is not the same in all."""
        fields = {name: value for name, value in vars(config).items() if name not in _OWN_OPTIONS}
        first, *others = self.exchange(fields)
        for process, theirs in enumerate(others, 1):
            for name, value in first.items():
                if theirs.get(name) != value:
                    raise ConfigError(
                        f"{name}={theirs.get(name)!r} in process {process}: must be {value!r}, as in process 0"
                    )

    def agree_on(self, what: str, value: str) -> None:
        """Raises ConfigError, in all processes, if a value is not the same in all. what: it in words."""
        first, *others = self.exchange(value)
        for process, theirs in enumerate(others, 1):
            if theirs != first:
                raise ConfigError(f"process {process} has {what} of its own: {theirs[:200]}; process 0: {first[:200]}")

    def least(self, value: int) -> int:
        """The least of all processes' values."""
        return min(self.exchange(value))

    # Loss

    def check(self) -> None:
        """Raises EngineDeadError if a process is lost."""
        if self._error is not None:
            raise EngineDeadError(self._error)

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """In it the engine's thread may get stuck when a process is lost, and this process is ended if it is."""
        self.check()
        self._inside = time.monotonic()
        try:
            yield
        finally:
            self._inside = None

    def tell(self, on_lost: Callable[[EngineDeadError], None]) -> None:
        """Has it called, by another thread, once a process is lost; at once if one is."""
        self._lost.add_done_callback(lambda lost: on_lost(EngineDeadError(self._error)))

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._closed or self._error is not None:
                return
            self._error = f"the engine of {self.size} processes has ended: {reason}"
        logger.debug("%s", self._error)
        self._part(reason)
        self._lost.set_exception(EngineDeadError(self._error))
        threading.Thread(target=self._end_if_stuck, name="end", daemon=True).start()

    def _part(self, reason: str | None) -> None:
        """Tells all others that it is over, None: as it should be, and wakes who waits for them."""
        for peer in self._peers:
            peer.offer(calls.encode("end", reason))
            peer.hang_up()
            peer.inbox.put(None)

    def _end_if_stuck(self) -> None:
        lost = time.monotonic()
        while True:
            time.sleep(STUCK_SECONDS / 10)
            inside = self._inside
            if inside is not None and time.monotonic() - max(inside, lost) > STUCK_SECONDS:
                print(f"jaxllm: {self._error}", file=sys.stderr, flush=True)
                os._exit(1)

    def leave(self) -> None:
        """At the end of the program. After a loss the devices may be stuck, and JAX would wait for them; and it aborts
        where process 0 has ended before."""
        self.close()
        failed = self._error is not None or self._reason is not None
        if failed or self.process > 0:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(int(failed))

    def close(self, reason: str | None = None) -> None:
        """Ends the group, as it should be or for a reason that the others are told."""
        with self._lock:
            if self._closed or self._error is not None:
                return
            self._closed, self._reason = True, reason
        self._part(reason)

    # Threads

    def _listen(self, peer: Peer) -> None:
        try:
            while True:
                data = peer.receive()
                if data:
                    self._take(peer, *calls.decode(data))
        except (EOFError, OSError):
            self._lose(f"{peer.name} has gone")
        except EngineDeadError as error:
            self._lose(f"{peer.name}: {error}")

    def _take(self, peer: Peer, kind: str, content: Any) -> None:
        if kind != "end":
            peer.inbox.put((kind, content))
        elif content is not None:
            self._lose(f"{peer.name}: {content}")
        else:
            self.close()

    def _watch(self) -> None:
        """Shows signs of life, and misses those of others."""
        beat = _beat(self._timeout)
        while not self._closed and self._error is None:
            before = time.monotonic()
            time.sleep(beat)
            now = time.monotonic()
            late = now - before - beat
            for peer in self._peers:
                peer.offer(self._sign())
                peer.seen += max(0.0, late)  # while this process stood still it could not hear
                if now - peer.seen > self._timeout:
                    self._lose(f"{peer.name} has given no sign of life for {self._timeout:g} s")
            self._look()

    def _sign(self) -> bytes:
        """Of life."""
        return b""

    def _look(self) -> None:
        """What else is looked after."""

    def _next(self, peer: Peer, kind: str, timeout: float | None = None) -> Any:
        """The peer's next message, of that kind, in `timeout` seconds, or START_SECONDS."""
        timeout = START_SECONDS if timeout is None else timeout
        self.check()
        try:
            message = peer.inbox.get(timeout=timeout)
        except queue.Empty:
            self._lose(f"{peer.name} has not come to terms in {timeout:g} s")
            message = None
        if message is None:
            self.check()
            raise EngineDeadError("the engine has been closed")
        assert message[0] == kind, f"{peer.name} says {message[0]!r} where {kind!r} was to come"
        return message[1]

    def _send(self, peer: Peer, kind: str, content: Any) -> None:
        self._send_bytes(peer, calls.encode(kind, content))

    def _send_bytes(self, peer: Peer, data: bytes) -> None:
        try:
            peer.send(data)
        except OSError:
            self._lose(f"{peer.name} has gone")
            self.check()
            raise EngineDeadError("the engine has been closed") from None


def _beat(timeout: float) -> float:
    """Seconds between signs of life, where none in `timeout` means a loss."""
    return min(1.0, timeout / 5)


class Leader(Group):
    """Process 0's side."""

    def __init__(self, peers: list[Peer], timeout: float):
        self._failures: dict[int, tuple[float, str]] = {}  # launches that have failed elsewhere, by process: since when
        self._num_called = 0
        self._num_done = {peer.process: 0 for peer in peers}  # of these, as of the last sign of life
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], concurrent.futures.Future]] = queue.SimpleQueue()
        super().__init__(0, len(peers) + 1, peers, timeout)
        threading.Thread(target=self._work, name="read", daemon=True).start()

    def exchange(self, value: Any) -> list[Any]:
        _, own = calls.decode(calls.encode("value", value))
        values = [own] + [self._next(peer, "value") for peer in self._peers]
        for peer in self._peers:
            self._send(peer, "values", values)
        return values

    def call(self, name: str, args: tuple) -> None:
        """Has all others call their device's method."""
        self.check()
        data = calls.encode("call", (name, args))
        self._num_called += 1
        for peer in self._peers:
            self._send_bytes(peer, data)

    def collect(self, timeout: float | None = None) -> None:
        """Waits until all others have done the last call. Raises RuntimeError for what one of them raised, and
        EngineDeadError if one takes longer than `timeout` seconds, or START_SECONDS."""
        errors = []
        for peer in self._peers:
            error = self._next(peer, "answer", timeout)
            self._failures.pop(peer.process, None)
            errors += [] if error is None else [f"{peer.name}: {error}"]
        if errors:
            raise RuntimeError("; ".join(errors))

    def wait[T](self, function: Callable[[], T]) -> T:
        """Its result, which may take forever once a process is lost or stuck: that raises EngineDeadError instead."""
        self.check()
        job: concurrent.futures.Future = concurrent.futures.Future()
        self._jobs.put((function, job))
        first = concurrent.futures.FIRST_COMPLETED
        if not concurrent.futures.wait((job, self._lost), STALLED_SECONDS, first).done:
            behind = [peer.name for peer in self._peers if self._num_done[peer.process] < self._num_called]
            stuck = f"stuck before the end of a launch: {', '.join(behind)}" if behind else "the devices are stuck"
            self._lose(f"a step has not ended for {STALLED_SECONDS:g} s, though all processes are alive; {stuck}")
        self.check()
        return job.result()

    def _work(self) -> None:
        """Not a pool's thread: at its end a program would wait for one that is stuck."""
        while True:
            function, job = self._jobs.get()
            try:
                job.set_result(function())
            except BaseException as error:
                job.set_exception(error)
            del function, job

    def _take(self, peer: Peer, kind: str, content: Any) -> None:
        if kind == "done":
            self._num_done[peer.process] = content
        elif kind == "failed":
            self._failures[peer.process] = time.monotonic(), f"{peer.name}: {content}"
        else:
            super()._take(peer, kind, content)

    def _look(self) -> None:
        inside = self._inside  # once: the engine's thread may leave the launch meanwhile
        if inside is not None and time.monotonic() - inside > STALLED_SECONDS:
            self._lose(f"process 0 has not come back from a launch for {STALLED_SECONDS:g} s")
        for since, text in list(self._failures.values()):
            if time.monotonic() - since > FAILED_SECONDS:
                self._lose(text)


class Follower(Group):
    """The side of every other process."""

    def __init__(self, process: int, size: int, leader: Peer, timeout: float):
        self._leader = leader
        self._num_done = 0  # calls that this process is through with
        super().__init__(process, size, [leader], timeout)

    def _sign(self) -> bytes:
        return calls.encode("done", self._num_done)

    def exchange(self, value: Any) -> list[Any]:
        self._send(self._leader, "value", value)
        return self._next(self._leader, "values")

    def calls(self) -> Iterator[tuple[str, list]]:
        """What process 0 has its device do, until it closes the engine. Raises EngineDeadError when it is lost."""
        while True:
            message = self._leader.inbox.get()
            if message is None:
                self.check()
                return
            kind, content = message
            assert kind == "call", kind
            yield content[0], content[1]
            self._num_done += 1

    def answer(self, error: str | None, of_launch: bool = False) -> None:
        """Tells how a call has ended; of those that nobody waits for only that they have failed."""
        self._send(self._leader, "failed" if of_launch else "answer", error)


def join(config: EngineConfig) -> Leader | Follower | None:
    """Meets the other processes of the engine, and has JAX join their devices; None if there are none.

    Raises:
      ConfigError: the options do not fit this machine, or JAX's devices are in use already.
      EngineDeadError: a process has not come, or is lost.
    """
    if config.coordinator_address is None:
        return None
    import jax

    if jax.distributed.is_initialized():
        raise ConfigError(
            f"coordinator_address={config.coordinator_address!r}: jax.distributed has been initialized already; the "
            "engine does so itself, and a process takes part in one engine"
        )
    platform.configure_group()
    address, count, process, devices = _places(config)
    if count == 1:
        return None
    host, _, digits = address.rpartition(":")
    host, port = host.strip("[]"), int(digits)
    group = _meet(host, port, count, process, config.heartbeat_timeout_seconds)
    atexit.register(group.leave)
    if process > 0:
        group.tell(_end)
    found = group.exchange(_free_port(port + 1) if process == 0 else None)[0]
    with group.launching(), coordination.apart():
        try:
            jax.distributed.initialize(
                f"{address[: -len(digits)]}{found}", count, process, devices, cluster_detection_method="deactivate"
            )
        except (RuntimeError, ValueError) as error:
            group.close(f"{type(error).__name__}: {error}")
            raise ConfigError(f"coordinator_address={config.coordinator_address!r}: {error}") from error
    return group


def _end(lost: EngineDeadError) -> None:
    """Ends a follower whose group is lost, with status 1, at once: JAX's service ends a while after process 0, and then
    JAX aborts the process (SIGABRT), and names nobody."""
    sys.stderr.write(f"jaxllm: {lost}\n")  # in one piece: the engine's thread may be told at the same time
    sys.stderr.flush()
    os._exit(1)


def _places(config: EngineConfig) -> tuple[str, int, int, Sequence[int] | None]:
    """Process 0's address, how many processes there are, which this is, and which devices are its own if not all."""
    if config.coordinator_address != "auto":
        assert config.coordinator_address and config.num_processes is not None and config.process_id is not None
        return config.coordinator_address, config.num_processes, config.process_id, None
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize's own way, which tells nobody

    found = ClusterEnv.auto_detect_unset_distributed_params(
        None, config.num_processes, config.process_id, None, None, JOIN_SECONDS
    )
    address, count, process, devices = found
    if address is None or count is None or process is None:
        raise ConfigError("coordinator_address='auto': JAX finds no TPU slice and no cluster here; give HOST:PORT")
    return address, count, process, devices


def _meet(host: str, port: int, count: int, process: int, timeout: float) -> Leader | Follower:
    if process > 0:
        try:
            return Follower(process, count, visit(host, port, process, JOIN_SECONDS), timeout)
        except OSError as error:
            raise EngineDeadError(f"process 0 does not answer at {host}:{port}: {error}") from error
    try:
        listening = listen(port)
    except OSError as error:
        raise ConfigError(f"coordinator_address: process 0 cannot listen on port {port}: {error.strerror}") from error
    with listening:
        try:
            return Leader(meet(listening, count, JOIN_SECONDS, _beat(timeout)), timeout)
        except TimeoutError as error:
            raise EngineDeadError(f"the engine of {count} processes does not start: {error}") from error


def _free_port(first: int) -> int:
    """The first that nobody listens on."""
    for port in range(first, min(first + 100, 65536)):
        with contextlib.suppress(OSError), listen(port):
            return port
    raise ConfigError(f"coordinator_address: no port from {first} on is free for JAX")

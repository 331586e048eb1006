"""The engine core behind one interface, in this process or in one of its own (see `restart.py` for that one's end)."""

import collections
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Protocol

import msgspec

from jaxllm.config import EngineConfig
from jaxllm.engine.messages import Close, Dead, FromCore, Ready, ToCore, decode, encode
from jaxllm.errors import EngineDeadError, JaxllmError


class Client(Protocol):
    """Sends messages to an engine core and receives its own. `send` and `close` may be called from any thread.

    Attributes:
      ready: what the core said of itself.
      restarting: the core has died, and another one is being started.
      num_restarts: how often that has happened.
    """

    ready: Ready
    num_restarts: int

    @property
    def restarting(self) -> bool: ...

    def send(self, message: ToCore) -> None:
        """Hands a message over; raises EngineDeadError if nobody is there to take it."""

    def receive(self, timeout: float) -> list[FromCore]:
        """What the core has to say, waiting up to `timeout` seconds. Raises EngineDeadError once it has ended."""

    def close(self) -> None:
        """Ends the core; `receive` then raises EngineDeadError."""


class InProcessClient:
    """Runs the core inside `receive`, on the caller's thread: nothing is serialized, nothing runs in between."""

    restarting, num_restarts = False, 0

    def __init__(self, core) -> None:
        self._core = core
        self._inbox: collections.deque[ToCore] = collections.deque()
        self._outbox: list[FromCore] = []
        self._wake = threading.Event()
        self._ended: str | None = None  # why, once it has
        self.ready: Ready = core.ready()

    def send(self, message: ToCore) -> None:
        self._check()
        self._inbox.append(message)
        self._wake.set()

    def receive(self, timeout: float) -> list[FromCore]:
        if not (self._outbox or self._inbox or self._core.has_work or self._ended):
            self._wake.wait(timeout)
        self._wake.clear()
        self._check()
        with _between_steps():
            try:
                while self._inbox:
                    self._core.handle(self._inbox.popleft())
                if self._core.has_work:
                    self._outbox += self._core.step()
            except BaseException as error:
                self._check()  # closed meanwhile: that is why
                self._ended = f"the engine has failed: {type(error).__name__}: {error}"
                raise
        messages, self._outbox = self._outbox, []
        return messages

    def _check(self) -> None:
        if self._ended is not None:
            raise EngineDeadError(self._ended)

    def close(self) -> None:
        self._ended = self._ended or "the engine has been closed"
        self._wake.set()
        self._core.close()


@contextlib.contextmanager
def _between_steps() -> Iterator[None]:
    """Puts Ctrl-C off to the end of the block: the core's state is whole only between steps."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupted = []
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        raise KeyboardInterrupt


class CoreProcess:
    """A core in a process of its own, that is spoken to in msgpack over a socket pair. Call `wait` before all else.

    Attributes:
      ready: once `wait` has returned True.
      pid: of the process.
    """

    ready: Ready

    def __init__(self, config: EngineConfig):
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "jaxllm.engine.process", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self.pid = self._process.pid
        self._socket, self._connection = ours, Connection(os.dup(ours.fileno()))
        # Connection.poll makes a selector each time, while streams wait for this thread to let go of the interpreter.
        self._poller = select.poll()
        self._poller.register(self._connection.fileno(), select.POLLIN)
        self._lock = threading.Lock()
        self._closed = False
        self._last_words: Exception | None = None
        with self._lock, contextlib.suppress(OSError):  # then `wait` finds out
            self._connection.send_bytes(msgspec.msgpack.encode(config))

    def wait(self, timeout: float | None) -> bool:
        """Waits up to `timeout` seconds for the core to be ready; whether it is. Raises what it failed with."""
        try:
            if not self._connection.poll(timeout):
                return False
        except OSError as error:
            raise self._death() from error
        first = self._receive_first()
        self.ready = first
        return True

    def _receive_first(self) -> Ready:
        """Raises SystemExit where the core has followed another process's, which has been closed."""
        try:
            first = self._receive_one()
        except EngineDeadError:
            if self._process.poll() == 0:
                raise SystemExit(0) from None
            raise
        assert isinstance(first, Ready)
        return first

    def send(self, message: ToCore) -> None:
        """Hands a message over; raises EngineDeadError if nobody is there to take it."""
        with self._lock:
            try:
                self._connection.send_bytes(encode(message))
            except OSError as error:
                raise EngineDeadError(f"the engine process {self.pid} has ended") from error

    def receive(self, timeout: float) -> list[FromCore]:
        """What the core has to say, waiting up to `timeout` seconds. Once it has ended, and all it said before has been
        received, raises EngineDeadError, or the error of `jaxllm.errors` that it ended with."""
        if self._last_words is not None:
            raise self._last_words
        messages: list[FromCore] = []
        try:
            while self._poller.poll(0 if messages else timeout * 1000):  # milliseconds
                messages.append(self._receive_one())
        except (OSError, JaxllmError) as error:
            self._last_words = self._death() if isinstance(error, OSError) else error
            if not messages:
                raise self._last_words from None
        return messages

    def _receive_one(self) -> FromCore:
        try:
            message = decode(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(message, Dead):
            raise _typed_error(message)
        return message

    def _death(self) -> EngineDeadError:
        if self._closed:
            return EngineDeadError("the engine has been closed")
        try:
            code: int | str = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "none"
        return EngineDeadError(f"the engine process {self.pid} has ended (exit status {code})")

    def close(self) -> None:
        """Ends the core; `receive` then raises EngineDeadError. May be called from any thread."""
        self._closed = True
        self._say_goodbye()
        # Not closed but shut down: other threads may be in the middle of sending and receiving, and get to know.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _say_goodbye(self) -> None:
        """So that the core knows that nobody was lost. Not at any cost: it may have stopped taking messages in."""
        if not self._lock.acquire(timeout=1):
            return
        try:
            writable = select.poll()
            writable.register(self._connection.fileno(), select.POLLOUT)
            if writable.poll(1000):  # milliseconds
                self._connection.send_bytes(encode(Close()))
        except (OSError, ValueError):  # it has gone, or been buried
            pass
        finally:
            self._lock.release()

    def bury(self) -> None:
        """Ends the process without its help, if it has not ended, and closes what is left of it.

        Only for the thread that receives.
        """
        self._process.kill()
        self._process.wait()
        with self._lock:
            self._connection.close()
            self._socket.close()


def _typed_error(message: Dead) -> Exception:
    """The core's last error as the type it was raised with, if it is one of jaxllm's own."""
    from jaxllm import errors

    kind = getattr(errors, message.kind, None)
    if isinstance(kind, type) and issubclass(kind, errors.JaxllmError) and kind is not errors.InvalidRequestError:
        return kind(message.error)
    return EngineDeadError(f"{message.kind}: {message.error}")

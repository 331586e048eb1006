"""The engine core behind one interface, in this process or in one of its own."""

import collections
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import Protocol

import msgspec

from jaxllm.config import EngineConfig
from jaxllm.engine.messages import Dead, FromCore, Ready, ToCore, decode, encode
from jaxllm.errors import EngineDeadError


class Client(Protocol):
    """Sends messages to an engine core and receives its own. `send` and `close` may be called from any thread."""

    ready: Ready

    def send(self, message: ToCore) -> None:
        """Hands a message over; raises EngineDeadError if nobody is there to take it."""

    def receive(self, timeout: float) -> list[FromCore]:
        """What the core has to say, waiting up to `timeout` seconds. Raises EngineDeadError once it has ended."""

    def close(self) -> None:
        """Ends the core; `receive` then raises EngineDeadError."""


class InProcessClient:
    """Runs the core inside `receive`, on the caller's thread: nothing is serialized, nothing runs in between."""

    def __init__(self, core) -> None:
        self._core = core
        self._inbox: collections.deque[ToCore] = collections.deque()
        self._wake = threading.Event()
        self._closed = False
        self.ready: Ready = core.ready()

    def send(self, message: ToCore) -> None:
        if self._closed:
            raise EngineDeadError("the engine has been closed")
        self._inbox.append(message)
        self._wake.set()

    def receive(self, timeout: float) -> list[FromCore]:
        if not self._inbox and not self._core.has_work and not self._closed:
            self._wake.wait(timeout)
        self._wake.clear()
        if self._closed:
            raise EngineDeadError("the engine has been closed")
        while self._inbox:
            self._core.handle(self._inbox.popleft())
        return self._core.step() if self._core.has_work else []

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._wake.set()
            self._core.close()


class ProcessClient:
    """Runs the core in a process of its own and speaks msgpack with it over a socket pair."""

    def __init__(self, config: EngineConfig):
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "jaxllm.engine.process", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()
        self._connection.send_bytes(msgspec.msgpack.encode(config))
        first = self._receive_one()
        assert isinstance(first, Ready)
        self.ready = first

    def send(self, message: ToCore) -> None:
        with self._lock:
            try:
                self._connection.send_bytes(encode(message))
            except OSError as error:
                raise self._death() from error

    def receive(self, timeout: float) -> list[FromCore]:
        messages: list[FromCore] = []
        try:
            while self._connection.poll(0 if messages else timeout):
                messages.append(self._receive_one())
        except OSError as error:
            raise self._death() from error
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
        try:
            code: int | str = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "none"
        return EngineDeadError(f"the engine process {self._process.pid} has ended (exit status {code})")

    def close(self) -> None:
        with self._lock:
            self._connection.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _typed_error(message: Dead) -> Exception:
    """The core's last error as the type it was raised with, if it is one of jaxllm's own."""
    from jaxllm import errors

    kind = getattr(errors, message.kind, None)
    if isinstance(kind, type) and issubclass(kind, errors.JaxllmError) and kind is not errors.InvalidRequestError:
        return kind(message.error)
    return EngineDeadError(f"{message.kind}: {message.error}")


"""One end of a connection between two processes of an engine: frames over TCP."""

import contextlib
import os
import queue
import select
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

HELLO_SECONDS = 10.0  # for what a new connection has to say of itself
MAX_MESSAGE = 1 << 28  # bytes: a launch has some 100 kB, a table's row or a step's masks a few MB
GREETING = b"jaxllm process "


class Peer:
    """Another process.

    Attributes:
      name: as messages call it.
      inbox: what it has said, (kind, content); None once there is nothing more to come.
      seen: time.monotonic() of its last sign of life.
    """

    def __init__(self, connected: socket.socket, process: int):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.settimeout(None)
        self._socket, self._connection = connected, Connection(os.dup(connected.fileno()))
        self._lock = threading.Lock()
        self._writable = select.poll()
        self._writable.register(connected, select.POLLOUT)
        self.process = process
        self.name = f"process {process} ({connected.getpeername()[0].removeprefix('::ffff:')})"
        self.inbox: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self.seen = time.monotonic()

    def send(self, data: bytes) -> None:
        """Waits until it is on its way; raises OSError if the other has gone."""
        with self._lock:
            self._connection.send_bytes(data)

    def offer(self, data: bytes) -> None:
        """Sends a short message if that needs no waiting, whatever becomes of it."""
        if self._lock.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError):
                    if self._writable.poll(0):
                        self._connection.send_bytes(data)
            finally:
                self._lock.release()

    def receive(self) -> bytes:
        """Its next message; b"" is a sign of life. Raises EOFError or OSError once it has gone, or says too much."""
        data = self._connection.recv_bytes(MAX_MESSAGE)
        self.seen = time.monotonic()
        return data

    def hang_up(self) -> None:
        """Ends sending and receiving, also of threads in the middle of it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


def listen(port: int = 0) -> socket.socket:
    """A socket on a port (0: a free one) of every address of this machine. Raises OSError."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def meet(listening: socket.socket, count: int, seconds: float, beat: float = 1.0) -> list[Peer]:
    """Takes in processes 1 to count - 1; those that wait for others get a sign of life every `beat` seconds. Raises
    TimeoutError naming those that have not come in `seconds`."""
    found: dict[int, Peer] = {}
    deadline = time.monotonic() + seconds
    while len(found) < count - 1:
        listening.settimeout(max(0.01, min(beat, deadline - time.monotonic())))
        try:
            connected, _ = listening.accept()
        except TimeoutError:
            if time.monotonic() < deadline:
                for peer in found.values():
                    peer.offer(b"")
                continue
            missing = ", ".join(str(i) for i in range(1, count) if i not in found)
            raise TimeoutError(f"process {missing} has not come in {seconds:g} s") from None
        process = _greeted(connected)
        if process is not None and 0 < process < count and process not in found:
            found[process] = Peer(connected, process)
        else:
            connected.close()  # somebody else's
    for peer in found.values():
        peer.seen = time.monotonic()  # nobody has listened to it yet
    return [found[process] for process in range(1, count)]


def _greeted(connected: socket.socket) -> int | None:
    """The number of the process that has connected, None for a stranger."""
    connected.settimeout(HELLO_SECONDS)
    hello = b""
    with contextlib.suppress(OSError):
        while len(hello) < len(GREETING) + 4:
            part = connected.recv(len(GREETING) + 4 - len(hello))
            if not part:
                break
            hello += part
    is_whole = len(hello) == len(GREETING) + 4 and hello.startswith(GREETING)
    return int.from_bytes(hello[len(GREETING) :], "little") if is_whole else None


def visit(host: str, port: int, process: int, seconds: float) -> Peer:
    """Connects with process 0, as `process`, once it listens. Raises OSError if it does not in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            connected = socket.create_connection((host, port), timeout=HELLO_SECONDS)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    connected.sendall(GREETING + process.to_bytes(4, "little"))
    return Peer(connected, 0)

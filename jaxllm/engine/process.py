"""The engine core as a process: `python -m jaxllm.engine.process FD`, where FD is its end of a socket pair."""

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from jaxllm.config import EngineConfig
from jaxllm.engine import heap
from jaxllm.engine.messages import Close, Dead, FromCore, ToCore, Utility, UtilityResult, decode, encode


def main() -> None:
    """Reads an EngineConfig, then messages, until the other side says that it closes, or is gone."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # When the device is done, the loop shall not wait Python's 5 ms for a thread that takes in a burst of requests.
    sys.setswitchinterval(0.0005)
    # Ctrl-C and the end of a service reach the whole group of processes: both are the parent's to handle, which lets
    # requests end before it closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    try:
        serve(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone or done
    except Exception as error:
        traceback.print_exc()
        connection.send_bytes(encode(Dead(type(error).__name__, str(error))))
        sys.exit(1)


def serve(connection: Connection) -> None:
    """Builds the core and runs it, all messages that have come, then one step, until it is closed. Raises EOFError or
    OSError where the other side has gone without saying so."""
    config = msgspec.msgpack.decode(connection.recv_bytes(), type=EngineConfig)
    from jaxllm.engine.build import build_core

    built = threading.Event()
    threading.Thread(target=_end_with_parent, args=(connection, built), name="parent", daemon=True).start()
    core = build_core(config)
    built.set()
    heap.freeze()
    connection.send_bytes(encode(core.ready()))
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    lock = threading.Lock()  # of the connection's way out

    def send(message: FromCore) -> None:
        with lock:
            connection.send_bytes(encode(message))

    def take_in(message: ToCore | Close) -> None:
        """Runs on a thread of its own: prompts are hashed here while the loop waits for the device."""
        if isinstance(message, Close):
            inbox.put(message)
        elif isinstance(message, Utility) and message.name == "ping" and core.compiling:
            send(UtilityResult(message.call))  # the loop cannot, for as long as that takes
        else:
            inbox.put(core.prepare(message))

    threading.Thread(target=_read, args=(connection, inbox, take_in), name="inbox", daemon=True).start()
    core.watch(inbox.put)
    reason: str | None = "its process has gone"
    try:
        while True:
            while not core.has_work or not inbox.empty():
                message = inbox.get()
                if isinstance(message, BaseException):
                    raise message
                if isinstance(message, Close):
                    reason = None
                    return
                core.handle(message)
                if isinstance(message, Utility) and message.name == "warm_up":
                    heap.freeze()  # what tracing all the executables has left, too
            for output in core.step():
                send(output)
    except EOFError:
        raise
    except OSError:
        if not _has_said_goodbye(inbox):  # as long as it had not yet been heard
            raise
        reason = None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        core.close(reason)


def _has_said_goodbye(inbox: queue.SimpleQueue) -> bool:
    """Whether the other side had closed the core before it went."""
    with contextlib.suppress(queue.Empty):
        while not isinstance(message := inbox.get(timeout=1), BaseException):
            if isinstance(message, Close):
                return True
    return False


def _end_with_parent(connection: Connection, built: threading.Event) -> None:
    """Ends this process if the parent goes before the core is built; it never is where it follows another's."""
    with socket.socket(fileno=os.dup(connection.fileno())) as parent:
        while not built.wait(0.5):
            try:
                gone = parent.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
            except BlockingIOError:
                continue
            except OSError:
                gone = True
            if gone:
                os._exit(1)


def _read(connection: Connection, inbox: queue.SimpleQueue, take_in: Callable[[ToCore | Close], None]) -> None:
    """Takes messages in as they come, so that the parent may send any number of them without reading meanwhile."""
    try:
        while True:
            take_in(decode(connection.recv_bytes()))
    except BaseException as error:
        inbox.put(error)


if __name__ == "__main__":
    main()

"""The loop of the core's process: nobody waits longer than a step to be seen, and nothing turns while it is idle."""

import socket
import threading
import time
from multiprocessing.connection import Connection

import msgspec
import pytest

from jaxllm.config import EngineConfig
from jaxllm.engine import build, heap, process
from jaxllm.engine.messages import Close, Ready, StepOutputs, Utility, UtilityResult, decode, encode


class Core:
    """Works `steps_left` steps for each message; `gate` holds a step up."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.steps_left = 0
        self.compiling = False
        self.gate = threading.Event()
        self.gate.set()
        self.in_step = threading.Event()
        self.closed = threading.Event()
        self.ended: Exception | None = None  # what `serve` has raised

    def ready(self) -> Ready:
        return Ready(1, 1, 1, 1)

    def prepare(self, message):
        self.log.append(f"prepare {message.call}")
        return message

    def handle(self, message) -> None:
        self.log.append(f"handle {message.call}")
        self.steps_left = 3

    @property
    def has_work(self) -> bool:
        return self.steps_left > 0

    def step(self) -> list:
        self.log.append("step")
        self.steps_left -= 1
        self.in_step.set()
        assert self.gate.wait(10)
        return [UtilityResult(0, value=len(self.log))] if not self.steps_left else [StepOutputs([], ["a"], [1])]

    def watch(self, on_lost) -> None:
        pass

    def close(self, reason=None) -> None:
        self.reason = reason
        self.closed.set()


@pytest.fixture
def served(monkeypatch):
    """A core, and the parent's end of its connection."""
    core = Core()
    monkeypatch.setattr(build, "build_core", lambda config: core)
    monkeypatch.setattr(heap, "freeze", lambda: core.log.append("freeze"))  # this process is pytest's
    ours, theirs = socket.socketpair()
    parent = Connection(ours.detach())

    def run() -> None:
        try:
            process.serve(Connection(theirs.detach()))
        except (EOFError, OSError) as error:
            core.ended = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    parent.send_bytes(msgspec.msgpack.encode(EngineConfig()))
    assert isinstance(decode(parent.recv_bytes()), Ready)
    yield core, parent
    parent.close()
    thread.join(timeout=10)
    assert not thread.is_alive() and core.closed.is_set()
    assert (core.ended is None) == (core.reason is None)


def send(parent: Connection, call: int) -> None:
    parent.send_bytes(encode(Utility(call, "stats")))


def test_what_comes_during_a_step_is_prepared_meanwhile_and_handled_before_the_next(served):
    core, parent = served
    core.gate.clear()
    send(parent, 1)
    assert core.in_step.wait(10)
    send(parent, 2)
    send(parent, 3)
    deadline = time.monotonic() + 10
    while "prepare 3" not in core.log and time.monotonic() < deadline:
        time.sleep(0.001)
    assert core.log == ["freeze", "prepare 1", "handle 1", "step", "prepare 2", "prepare 3"]
    core.gate.set()
    received = [decode(parent.recv_bytes()) for _ in range(4)]
    assert core.log[6:] == ["handle 2", "handle 3", "step", "step", "step"]
    assert [type(message) for message in received] == [StepOutputs, StepOutputs, StepOutputs, UtilityResult]


def test_an_idle_core_does_not_turn(served):
    core, parent = served
    send(parent, 1)
    for _ in range(3):
        parent.recv_bytes()
    log = list(core.log)
    time.sleep(0.1)
    assert core.log == log == ["freeze", "prepare 1", "handle 1", "step", "step", "step"]


def test_a_loop_that_waits_for_a_compilation_counts_as_alive(served):
    core, parent = served
    ping = encode(Utility(-1, "ping"))
    core.gate.clear()
    send(parent, 1)
    assert core.in_step.wait(10)
    parent.send_bytes(ping)
    assert not parent.poll(0.1)  # it may hang: its answer comes from the loop, if at all
    core.compiling = True
    parent.send_bytes(ping)
    assert parent.poll(10) and decode(parent.recv_bytes()) == UtilityResult(-1)
    core.gate.set()
    while not isinstance(decode(parent.recv_bytes()), UtilityResult):
        pass


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("says_so", [False, True])
def test_a_client_that_has_gone_without_a_word_is_lost(served, steps, says_so):
    core, parent = served
    if steps:  # what it makes then finds nobody
        core.gate.clear()
        send(parent, 1)
        assert core.in_step.wait(10)
    if says_so:
        parent.send_bytes(encode(Close()))
    parent.close()
    core.gate.set()
    assert core.closed.wait(10)
    assert core.reason == (None if says_so else "its process has gone")


def test_what_warming_up_leaves_is_frozen_too(served):
    core, parent = served
    parent.send_bytes(encode(Utility(1, "warm_up")))
    for _ in range(3):
        parent.recv_bytes()
    assert core.log == ["freeze", "prepare 1", "handle 1", "freeze", "step", "step", "step"]

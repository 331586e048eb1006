"""What processes say to each other, and that none waits for one that is lost."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxllm.engine import calls, group
from jaxllm.engine.executables import Forward, Sample, Stage, UpdatePages, Wide, WriteMasks
from jaxllm.engine.group import Follower, Leader
from jaxllm.engine.peer import listen, meet, visit
from jaxllm.engine.sampling import VARIANTS
from jaxllm.errors import ConfigError, EngineDeadError

OTHER = """
import sys, time
from jaxllm.engine.group import Follower
from jaxllm.engine.peer import visit
follower = Follower(1, 2, visit("127.0.0.1", int(sys.argv[1]), 1, 10), float(sys.argv[2]))
print("joined", flush=True)
for name, args in follower.calls():
    time.sleep(args[0])
    follower.answer(None)
"""


@pytest.fixture
def pair():
    """A leader and its two followers, in one process."""
    with listen() as listening, concurrent.futures.ThreadPoolExecutor() as pool:
        port = listening.getsockname()[1]
        others = [pool.submit(visit, "127.0.0.1", port, process, 10) for process in (1, 2)]
        leader = Leader(meet(listening, 3, 10), 5)
        followers = [Follower(process, 3, other.result(), 5) for process, other in enumerate(others, 1)]
    yield leader, followers
    for one in (leader, *followers):
        one.close()


@pytest.fixture
def other(root):
    """A leader and a follower's process."""
    with listen() as listening:
        command = [sys.executable, "-c", OTHER, str(listening.getsockname()[1]), "1.5"]
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        leader = Leader(meet(listening, 2, 60), 1.5)
    assert process.stdout.readline() == "joined\n"
    yield leader, process
    process.kill()
    process.communicate()
    leader.close()


def test_calls_are_what_they_were():
    arrays = [np.arange(6, dtype=np.int32).reshape(2, 3), np.zeros((0, 4), np.float32), np.array([True, False])]
    keys = [Forward(8, True), Stage(), UpdatePages(), Wide(8, 3), WriteMasks(4), *(Sample(4, v) for v in VARIANTS)]
    kind, (name, (count, flag, found, listed)) = calls.decode(calls.encode("call", ("name", (3, True, arrays, keys))))
    assert (kind, name, count, flag, listed) == ("call", "name", 3, True, keys)
    for one, two in zip(found, arrays, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape and (one == two).all()
    transposed = np.arange(6).reshape(2, 3).T
    assert (calls.decode(calls.encode("call", [transposed]))[1][0] == transposed).all()
    for data in (b"", b"\xc1", calls.encode("call", 3)[1:], b"\x92\xa1x\xc7\x04\x02\x92\xa1x\x80"):
        with pytest.raises(EngineDeadError):
            calls.decode(data)


def test_all_agree(pair):
    leader, followers = pair
    with concurrent.futures.ThreadPoolExecutor() as pool:

        def each(method, *values):
            listed = zip((leader, *followers), values, strict=True)
            return [pool.submit(method, one, value) for one, value in listed]

        assert [future.result() for future in each(lambda one, value: one.least(value), 7, 5, 9)] == [5, 5, 5]
        assert [future.result() for future in each(lambda one, value: one.exchange(value), "a", [1], {"b": 2})] == [
            ["a", [1], {"b": 2}]
        ] * 3
        for future in each(lambda one, value: one.agree_on("a value", value), "x", "x", "y"):
            with pytest.raises(ConfigError, match="process 2"):
                future.result()


def test_calls_come_in_order_and_answers_are_awaited(pair):
    leader, followers = pair
    leader.call("one", (1,))
    leader.call("two", ([2],))
    for follower in followers:
        heard = follower.calls()
        assert [next(heard), next(heard)] == [("one", [1]), ("two", [[2]])]
    followers[0].answer(None)
    followers[1].answer("ValueError: no")
    with pytest.raises(RuntimeError, match=r"process 2 \(.*\): ValueError: no"):
        leader.collect(5)
    with pytest.raises(EngineDeadError, match=r"process 1 .* in 0.1 s"):
        leader.collect(0.1)


def test_one_that_lives_and_does_not_come_on_is_named(pair, monkeypatch):
    """Process 1 is through with both calls, process 2 hangs in the second."""
    leader, followers = pair
    monkeypatch.setattr(group, "STALLED_SECONDS", 2.5)  # two signs of life
    for number in (1, 2):
        leader.call("one", (number,))
    heard = [follower.calls() for follower in followers]
    for each in heard:
        next(each), next(each)
    followers[0].answer(None)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(next, heard[0], None)  # asks for a third
        assert leader.wait(lambda: 7) == 7
        with pytest.raises(EngineDeadError, match=r"has not ended for 2.5 s.* of a launch: process 2 \([^,]*\)$"):
            leader.wait(threading.Event().wait)
        with pytest.raises(EngineDeadError):
            leader.check()


def test_one_that_does_not_come_to_terms_ends_a_start(pair, monkeypatch):
    """As one that lives and reads its weights forever; either side says so."""
    leader, followers = pair
    monkeypatch.setattr(group, "START_SECONDS", 0.5)
    with pytest.raises(EngineDeadError, match=r"process 1 \(.*\) has not come to terms in 0.5 s"):
        leader.exchange("ready")
    with pytest.raises(EngineDeadError):
        followers[1].exchange("ready")


def test_a_launch_that_hangs_ends_the_group_and_one_that_ends_meanwhile_does_not(pair, monkeypatch):
    leader, _ = pair
    clock = time.monotonic

    def leaves_at(moment: float) -> float:
        leader._inside = None  # the engine's thread, while the other one asks for the time
        return moment

    leader._inside = clock()
    monkeypatch.setattr(group.time, "monotonic", lambda: leaves_at(clock()))
    leader._look()
    monkeypatch.undo()
    leader.check()
    monkeypatch.setattr(group, "STALLED_SECONDS", 0.2)
    with leader.launching():
        time.sleep(0.3)
        leader._look()
    with pytest.raises(EngineDeadError, match=r"process 0 has not come back from a launch for 0\.2 s"):
        leader.check()


def test_closing_ends_the_followers(pair):
    leader, followers = pair
    leader.close()
    for follower in followers:
        assert list(follower.calls()) == []
    with pytest.raises(EngineDeadError, match="closed"):
        leader.call("one", ())


def test_a_follower_tells_why_it_leaves(pair):
    leader, followers = pair
    followers[0].close("OutOfMemoryError: it does not fit")
    with pytest.raises(EngineDeadError, match=r"process 1 .*OutOfMemoryError: it does not fit"):
        leader.collect()
    with pytest.raises(EngineDeadError, match="OutOfMemoryError"):  # the others get to know it, too
        list(followers[1].calls())


def test_a_launch_that_fails_elsewhere_alone_ends_the_group(pair, monkeypatch):
    monkeypatch.setattr(group, "FAILED_SECONDS", 0.2)
    leader, followers = pair
    followers[1].answer("RuntimeError: out of memory", of_launch=True)
    with pytest.raises(EngineDeadError, match=r"process 2 .*out of memory"):
        leader.wait(lambda: time.sleep(10))


def test_one_that_works_for_long_is_not_lost_but_one_that_stands_still_is(other):
    leader, process = other
    leader.call("sleep", (2.5,))
    leader.collect()
    told = []
    leader.tell(told.append)
    os.kill(process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(EngineDeadError, match=r"process 1 \(.*\) has given no sign of life for 1.5 s"):
        leader.wait(lambda: time.sleep(30))
    assert time.monotonic() - begin < 15
    assert isinstance(told[0], EngineDeadError)
    with pytest.raises(EngineDeadError):
        leader.call("more", ())


def test_the_last_may_come_later_than_signs_of_life_may_stay_out():
    with listen() as free:
        port = free.getsockname()[1]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        joined = [pool.submit(group._meet, "127.0.0.1", port, 3, process, 1) for process in (0, 1)]
        time.sleep(2.5)
        joined.append(pool.submit(group._meet, "127.0.0.1", port, 3, 2, 1))
        three = [one.result(30) for one in joined]
        agreed = [pool.submit(one.least, value) for one, value in zip(three, (7, 5, 9))]
        assert [one.result(10) for one in agreed] == [5, 5, 5]
        time.sleep(1.5)
        for one in three:
            one.check()
    for one in three:
        one.close()


def test_strangers_are_left_out_and_who_is_missing_is_named():
    with listen() as listening, concurrent.futures.ThreadPoolExecutor() as pool:
        port = listening.getsockname()[1]
        for said in (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", b""):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(said)
        coming = pool.submit(visit, "127.0.0.1", port, 2, 10)
        with pytest.raises(TimeoutError, match="process 1 has not come"):
            meet(listening, 3, 1)
        coming.result().hang_up()


def test_a_start_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(group, "JOIN_SECONDS", 0.3)
    with listen() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on port {port}: Address already in use"):
            group._meet("127.0.0.1", port, 2, 0, 5)
        free = group._free_port(port)
        assert free > port
    with pytest.raises(EngineDeadError, match="process 1, 2 has not come"):
        group._meet("127.0.0.1", free, 3, 0, 5)
    with pytest.raises(EngineDeadError, match=f"process 0 does not answer at 127.0.0.1:{free}"):
        group._meet("127.0.0.1", free, 2, 1, 5)

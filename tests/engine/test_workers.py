"""Threads that a program which ends waits for no longer than it must."""

import gc
import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from jaxllm.engine.workers import Workers


def test_work_is_begun_in_order_and_its_failures_are_told():
    workers, begun = Workers(1), []
    futures = [workers.submit(lambda i=i: begun.append(i) or 10 // (i - 3)) for i in range(6)]
    assert [future.result() for future in futures if future is not futures[3]] == [-4, -5, -10, 10, 5]
    with pytest.raises(ZeroDivisionError):
        futures[3].result()
    assert begun == list(range(6))
    workers.close()
    workers.join()


def test_what_has_not_begun_can_be_cancelled():
    workers, go, begun = Workers(1), threading.Event(), threading.Event()
    first = workers.submit(lambda: begun.set() or go.wait(60))
    second, third = (workers.submit(lambda: "made") for _ in range(2))
    assert begun.wait(60) and second.cancel() and not first.cancel()
    workers.close()
    go.set()
    workers.join()
    assert first.result() is True
    with pytest.raises(CancelledError):
        third.result()


def test_threads_end_with_their_owner():
    workers = Workers(2)
    threads = workers._threads
    assert workers.submit(lambda: 1).result() == 1
    del workers
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


PROGRAM = """
import os
import time
from jaxllm.engine.workers import Workers
workers = Workers(2)
def work(name, seconds):
    time.sleep(seconds)
    os.write(1, name.encode() + b"\\n")  # at once: print writes a line's end by itself, and both threads write
for i in range(2):
    workers.submit(lambda: work("begun", 1))
for i in range(50):
    workers.submit(lambda: work("queued", 100))
time.sleep(0.3)
"""


def test_a_program_that_ends_waits_for_what_has_begun_alone(root):
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\n" * 2, "")

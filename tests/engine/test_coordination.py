"""JAX's coordination service beside process 0."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from jaxllm.engine import coordination
from jaxllm.engine.peer import listen

OPTIONS = dict(heartbeat_timeout=10, shutdown_timeout=5, recoverable=True)
PROGRAM = """
import sys, time
from jaxllm.engine.coordination import Service
service = Service(f"127.0.0.1:{sys.argv[1]}", 2, heartbeat_timeout=10, shutdown_timeout=5, recoverable=True)
print(service._child.pid, flush=True)
time.sleep(60)
"""


def free_port() -> int:
    with listen() as listening:
        return listening.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as visitor:
        visitor.settimeout(5)
        return visitor.connect_ex(("127.0.0.1", port)) == 0


def test_it_serves_until_it_is_told_to_end():
    port = free_port()
    service = coordination.Service(f"127.0.0.1:{port}", 2, **OPTIONS)
    assert answers(port)
    service.shutdown()
    assert service._child.returncode == 0 and not answers(port)
    service.shutdown()  # again


def test_what_keeps_it_from_starting_is_told():
    with pytest.raises(RuntimeError, match=r"coordination service does not start: TypeError: .*no_such_option"):
        coordination.Service(f"127.0.0.1:{free_port()}", 2, no_such_option=1)


def test_it_outlives_a_killed_process_0(root):
    port = free_port()
    parent = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(port)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        parent.send_signal(signal.SIGKILL)
        assert parent.communicate(timeout=10) == ("", ""), "nothing of it is held open by the child"
        assert answers(port)
    finally:
        os.kill(child, signal.SIGKILL)


def test_jax_is_given_it_and_then_its_own_again():
    from jax._src import distributed

    usual = distributed._jax.get_distributed_runtime_service
    with coordination.apart():
        assert distributed._jax.get_distributed_runtime_service is coordination.Service
    assert distributed._jax.get_distributed_runtime_service is usual

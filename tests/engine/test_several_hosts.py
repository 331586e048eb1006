"""Two processes of two CPU devices each run one engine: the tokens of one process, and an end when one is lost."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxllm import SamplingParams
from jaxllm.errors import ConfigError
from tests.engine import tiny
from tests.engine.process_of_several import outcome, rare

HEADS = dict(num_attention_heads=8, num_key_value_heads=4)
OPTIONS = dict(tiny.OPTIONS, max_num_seqs=8, max_num_batched_tokens=8, token_rungs=(8,), max_model_len=64)
SIGNS = 4  # seconds without a sign of life


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_checkpoint("llama", tmp_path_factory.mktemp("several"), **HEADS)


def sized(tensor: int) -> dict:
    """The options for so many shards; the cache has room for two long requests, so that others are preempted."""
    pages, heads = 2 * OPTIONS["max_model_len"] // OPTIONS["page_size"] + 1, HEADS["num_key_value_heads"] // tensor
    return OPTIONS | dict(kv_cache_memory_bytes=pages * tiny.LAYERS * 2 * heads * 8 * tiny.HEAD_DIM * 4)


@pytest.fixture(scope="module")
def alone(model) -> dict:
    """What one process with one device gives."""
    with tiny.llm(model, **sized(1)) as llm:
        return outcome(llm)


@pytest.fixture(scope="module")
def alone_rare(model) -> dict:
    with tiny.llm(model, **sized(1)) as llm:
        return json.loads(json.dumps(rare(llm)))


class Processes:
    """Those of an engine."""

    def __init__(self, root: Path, count: int, devices: int, **options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        options |= dict(coordinator_address=address, num_processes=count, heartbeat_timeout_seconds=SIGNS)
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"XLA_FLAGS": flags.strip()}
        self.all, self._said = [], []
        for process in range(count):
            reader, writer = os.pipe()
            command = [sys.executable, "-m", "tests.engine.process_of_several"]
            started = subprocess.Popen(
                [*command, json.dumps(options | {"process_id": process}), str(writer)],
                cwd=root,
                env=environment,
                pass_fds=[writer],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            os.close(writer)
            self.all.append(started)
            self._said.append(os.fdopen(reader))

    def hear(self, process: int) -> dict:
        """The next line that one says."""
        line = self._said[process].readline()
        assert line, self.all[process].stderr.read()
        return json.loads(line)

    def tell(self, word: str) -> None:
        """Has process 0 do something."""
        print(word, file=self.all[0].stdin, flush=True)

    def end(self) -> None:
        """Whatever they are doing."""
        for process, said in zip(self.all, self._said, strict=True):
            process.kill()
            process.communicate()
            said.close()

    def ended(self, process: int, within: float) -> tuple[int, str]:
        """Exit status and stderr of one that is about to end."""
        _, errors = self.all[process].communicate(timeout=within)
        return self.all[process].returncode, errors


@contextlib.contextmanager
def processes(*args, **options) -> Iterator[Processes]:
    started = Processes(*args, **options)
    try:
        yield started
    finally:
        started.end()


def check_outcome(found: dict, alone: dict) -> None:
    assert found["tokens"] == alone["tokens"]
    assert found["hits"] > 0
    assert found["preemptions"] > 0


def check_outcome_and_loss(group, alone, killed: int) -> None:
    """The tokens of one process; then one of the two is killed in a step, and the other ends and names it."""
    group.tell("outcome")
    check_outcome(group.hear(0), alone)
    group.tell("endless")
    assert group.hear(0)["begun"]
    time.sleep(0.3)
    group.all[killed].kill()
    status, errors = group.ended(1 - killed, within=20)
    assert status == 1
    assert f"process {killed} (127.0.0.1) has gone" in errors


def test_ranks_in_two_processes_and_a_killed_follower(root, model, alone):
    with processes(root, 2, 2, model=str(model), tensor_parallel_size=2, data_parallel_size=2, **sized(2)) as group:
        read = [group.hear(process)["bytes"] for process in (0, 1)]
        assert read == [(model / "model.safetensors").stat().st_size - header(model)] * 2  # a rank holds the model
        check_outcome_and_loss(group, alone, killed=1)


def test_shards_in_two_processes_and_a_killed_leader(root, model, alone):
    with processes(root, 2, 2, model=str(model), tensor_parallel_size=4, **sized(4)) as group:
        read = [group.hear(process)["bytes"] for process in (0, 1)]
        weights = (model / "model.safetensors").stat().st_size - header(model)
        norms = 4 * tiny.HIDDEN * (2 * tiny.LAYERS + 1)  # bytes of what all shards hold
        assert read == [(weights - norms) // 2 + norms] * 2
        check_outcome_and_loss(group, alone, killed=0)


def header(model: Path) -> int:
    """Bytes of the checkpoint's file that are no weights."""
    with open(model / "model.safetensors", "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "data"), [(1, 4), (4, 1), (2, 2)])
def test_every_launch_recovery_and_a_stopped_follower(root, model, alone, alone_rare, tensor, data):
    sizes = dict(tensor_parallel_size=tensor, data_parallel_size=data)
    with processes(root, 2, 2, model=str(model), **sizes, **sized(tensor)) as group:
        for process in (0, 1):
            group.hear(process)
        for _ in range(2):
            group.tell("rare")
            found = group.hear(0)
            assert found.pop("embedding") == pytest.approx(alone_rare["embedding"], abs=1e-4)
            assert found == {name: alone_rare[name] for name in ("tokens", "ids")}
        group.tell("recovered")
        assert group.hear(0)["tokens"] == alone["tokens"]
        group.tell("endless")
        assert group.hear(0)["begun"]
        time.sleep(0.3)
        group.all[1].send_signal(signal.SIGSTOP)
        status, errors = group.ended(0, within=SIGNS + 20)
        assert status == 1
        assert f"process 1 (127.0.0.1) has given no sign of life for {SIGNS} s" in errors


@pytest.mark.slow
def test_closing_ends_all(root, model):
    with processes(root, 2, 1, model=str(model), data_parallel_size=2, **OPTIONS) as group:
        for process in (0, 1):
            group.hear(process)
        group.all[0].stdin.close()
        group.all[0].stdin = None
        assert group.ended(0, within=20)[0] == 0
        assert group.ended(1, within=20)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (dict(), "2 processes have 4 devices, and all must be used: 1 × 4, 2 × 2, 4 × 1"),
        (dict(tensor_parallel_size=4, model="nowhere"), "nowhere"),
    ],
)
def test_what_cannot_work_is_said_by_all(root, model, sizes, said):
    with processes(root, 2, 2, **{"model": str(model), **OPTIONS, **sizes}) as group:
        for process in (0, 1):
            status, errors = group.ended(process, within=120)
            assert status == 1
            assert said in errors


def command(root: Path, model: Path, *arguments: str, **environment: str) -> list[subprocess.Popen]:
    """Two processes of one command, with what there is to add to the environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ["--coordinator-address", address, "--num-processes", "2", "--data-parallel-size", "2", "--page-size", "8"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "jaxllm", *arguments, "--model", str(model), *shared, "--process-id", str(process)],
            cwd=root,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]


@pytest.mark.slow
def test_commands_of_two_processes(root, model):
    """`generate` prints the text once; `serve` answers in process 0, and both end when it is told to."""
    both = command(root, model, "generate", "the thing", "--max-tokens", "8", "--quiet")
    (text, errors), (other, _) = (process.communicate(timeout=300) for process in both)
    assert [process.returncode for process in both] == [0, 0], errors
    with tiny.llm(model) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=8)
        expected = llm.generate("the thing", greedy)[0].outputs[0].text
    assert expected in text
    assert expected not in other

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    both = command(root, model, "serve", "--port", str(port), "--no-warm-up")
    try:
        body = json.dumps({"prompt": "the thing", "max_tokens": 8, "temperature": 0}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
        )
        deadline = time.monotonic() + 300
        while True:
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=300))
                break
            except OSError:
                assert time.monotonic() < deadline and both[0].poll() is None, both[0].communicate()
                time.sleep(0.5)
        assert answer["choices"][0]["text"] == expected
        both[0].terminate()
        assert [process.wait(timeout=60) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_a_leader_that_is_killed_while_steps_are_compiled_ends_the_other(root, model, tmp_path):
    both = command(root, model, "generate", "the thing", "--quiet", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
    try:
        deadline = time.monotonic() + 120
        while not any((tmp_path / "cache").glob("*")):
            assert time.monotonic() < deadline and both[0].poll() is None, both[0].communicate()
            time.sleep(0.05)
        both[0].kill()
        _, errors = both[1].communicate(timeout=60)
        assert both[1].returncode in (1, 2) and "process 0 (127.0.0.1) has gone" in errors, errors
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("warm_up", ["--warm-up", "--no-warm-up"])
def test_a_killed_server_ends_the_others_with_an_error(root, model, warm_up):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    both = command(root, model, "serve", "--port", str(port), warm_up)
    try:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10)
                break
            assert time.monotonic() < deadline and both[0].poll() is None
            time.sleep(0.2)
        both[0].kill()
        _, errors = both[1].communicate(timeout=60)
        assert both[1].returncode in (1, 2) and "process 0 (127.0.0.1)" in errors
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (dict(num_processes=2), "num_processes"),
        (dict(coordinator_address="here"), "coordinator_address"),
        (dict(coordinator_address="here:1", num_processes=2), "process_id"),
        (dict(coordinator_address="here:1", num_processes=2, process_id=2), "process_id"),
        (dict(heartbeat_timeout_seconds=0), "heartbeat_timeout_seconds"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, field):
    with pytest.raises(ConfigError, match=f"^{field}="):
        tiny.llm("nowhere", **options)

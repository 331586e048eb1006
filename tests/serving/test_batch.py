"""`jaxllm run-batch`: every row once, whatever happens in between."""

import base64
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxllm.cli.app import app
from jaxllm.errors import ConfigError
from jaxllm.serving.batch import OutputFile, Tally, run_batch
from tests.serving.test_completions import expected

SIZES = ["--token-rungs", "4,32,128", "--max-num-batched-tokens", "128", "--page-size", "8", "--max-num-seqs", "32"]
FLAGS = [*SIZES, "--no-warm-up", "--served-model-name", "tiny"]


def row(custom_id, url: str = "/v1/completions", **body) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def answers(path) -> dict:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line["response"] for line in lines}


def run(model: str, source, target, *flags: str):
    arguments = ["run-batch", "-i", str(source), "-o", str(target), "--model", model, *FLAGS, *flags]
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def test_rows_are_answered_as_the_server_would(server, files):
    source, target = files
    hello = [{"role": "user", "content": "the hand"}]
    rows = [
        row("a", prompt="the hand", temperature=0, max_tokens=8),
        row("b", "/v1/chat/completions", messages=hello, temperature=0, max_tokens=8),
        row("c", "/v1/responses", input="the hand", temperature=0, max_output_tokens=8),
        row("bad field", prompt="a", nonsense=1),
        row("bad value", prompt="a", n=0),
        row("stream", prompt="a", stream=True),
        row("other model", prompt="a", model="gpt"),
        row("no url", "/v1/moderations"),
        row("a", prompt="a"),
        row("é"),
    ]
    lines = [json.dumps(item) for item in rows] + ["", "{", "[1]", '{"custom_id": "\\ud800"}']
    source.write_text("\n".join(lines))

    def run_here() -> Tally:
        with OutputFile(target) as output:
            return server.call(run_batch, server.services, source, output, 4)

    assert run_here() == Tally(good=3, failed=10)
    by_line = {}
    for line in target.read_text().splitlines():
        entry = json.loads(line)
        by_line[int(entry["id"].removeprefix("batch_req_"))] = entry["response"]
    text = expected(server, "the hand", max_tokens=8).outputs[0].text
    assert by_line[0]["body"]["choices"][0]["text"] == text
    chat = server.post("/v1/chat/completions", messages=hello, temperature=0, max_tokens=8).json()
    assert by_line[1]["body"]["choices"][0]["message"] == chat["choices"][0]["message"]
    assert by_line[2]["body"]["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    statuses = [by_line[number]["status_code"] for number in sorted(by_line)]
    assert statuses == [200] * 3 + [400] * 3 + [404] + [400] * 6
    params = [by_line[number]["body"]["error"]["param"] for number in range(3, 10)]
    assert params == ["nonsense", "n", "stream", "model", "url", "custom_id", "prompt"]
    before = target.read_bytes()
    assert run_here() == Tally() and target.read_bytes() == before


def vector(item: dict) -> np.ndarray:
    value = item["embedding"]
    return np.frombuffer(base64.b64decode(value), "<f4") if isinstance(value, str) else np.array(value)


def test_embeddings_as_the_server_gives_them(server, files):
    source, target = files
    bodies = [{"input": ["the hand", "ring"]}, {"input": [5, 6], "encoding_format": "base64"}, {"input": ""}]
    source.write_text("\n".join(json.dumps(row(f"{i}", "/v1/embeddings", **body)) for i, body in enumerate(bodies)))
    with OutputFile(target) as output:
        assert server.call(run_batch, server.services, source, output, 4) == Tally(good=2, failed=1)
    found = answers(target)
    for number, body in enumerate(bodies[:2]):
        wanted = server.post("/v1/embeddings", **body).json()
        given, expected_vectors = ([vector(item) for item in a["data"]] for a in (found[f"{number}"]["body"], wanted))
        np.testing.assert_allclose(given, expected_vectors, atol=1e-4)  # other requests share the step
    assert found["2"]["status_code"] == 400 and found["2"]["body"]["error"]["param"] == "input"
    assert server.services.admission.samples == 0


def test_a_killed_run_goes_on(server, model, files):
    source, target = files
    source.write_text(
        "".join(
            json.dumps(row(f"{i}", prompt=[5 + i], max_tokens=100, seed=i, temperature=1.0)) + "\n" for i in range(40)
        )
    )
    command = [
        sys.executable,
        "-c",
        "from jaxllm.cli import main; main()",
        "run-batch",
        "-i",
        str(source),
        "-o",
        str(target),
    ]
    process = subprocess.Popen([*command, "--model", model, *FLAGS, "--max-concurrency", "4"], start_new_session=True)
    end = time.monotonic() + 60
    while not target.exists() or target.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = target.read_bytes().count(b"\n")
    with open(target, "ab") as file:
        file.write(b'{"id": "batch_req_9')  # a torn line
    with OutputFile(target) as output:
        tally = server.call(run_batch, server.services, source, output, 8)
    assert done < 40 and tally == Tally(good=40 - done)
    found = answers(target)
    assert set(found) == {str(i) for i in range(40)}
    assert all(answer["body"]["usage"]["completion_tokens"] for answer in found.values())


def test_files_that_do_not_fit_are_refused(model, files):
    source, target = files
    with pytest.raises(ConfigError, match="no such file"):
        run(model, source, target)
    source.write_text(json.dumps(row("a", prompt="a", max_tokens=1)) + "\n")
    with pytest.raises(ConfigError, match="is the input file"):
        run(model, source, source)
    target.write_text("something else\n")
    with pytest.raises(ConfigError, match="line 1 is no answer"):
        run(model, source, target)
    assert target.read_text() == "something else\n"
    target.unlink()
    with OutputFile(target), pytest.raises(ConfigError, match="another process"):
        run(model, source, target)

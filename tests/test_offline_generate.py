"""scripts/offline_generate.py: every row once, whatever happens."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from jaxllm.errors import ConfigError, InvalidRequestError
from tests.engine import tiny

OPTIONS = ["--token-rungs", "8,128", "--max-num-batched-tokens", "128", "--max-num-seqs", "8", "--page-size", "8"]
OPTIONS += ["--no-engine-process", "--no-warm-up"]
TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"


@pytest.fixture(scope="module")
def script(root):
    spec = importlib.util.spec_from_file_location("offline_generate", root / "scripts" / "offline_generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tiny.write_checkpoint("llama", tmp_path_factory.mktemp("offline"))
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return str(directory)


@pytest.fixture
def start(root, model, tmp_path):
    """Starts a run over `rows` (objects or bytes) in a process of its own; kills what is left at the end."""
    started = []
    source = tmp_path / "in.jsonl"

    def begin(rows=None, *flags) -> subprocess.Popen:
        write(source, rows)
        command = [sys.executable, "scripts/offline_generate.py", str(source), str(tmp_path / "out.jsonl")]
        options = ["--model", model, *OPTIONS, *flags]
        process = subprocess.Popen(
            [*command, *options],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def run(script, model, tmp_path):
    """Runs over `rows` in this process; what it said."""

    def call(rows=None, *flags) -> str:
        write(tmp_path / "in.jsonl", rows)
        app = typer.Typer()
        app.command()(script.main)
        arguments = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--model", model, *OPTIONS, *flags]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stderr

    return call


def write(path, rows) -> None:
    """Objects or bytes as JSONL; None leaves the file as it is."""
    if rows is not None:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")


def finish(process: subprocess.Popen) -> str:
    """Waits for success; what it said."""
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    return said


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_rows_of_every_kind(run, tmp_path):
    rows = [
        {"prompt": "the hand", "id": "a"},
        {"messages": [{"role": "user", "content": "the"}], "max_tokens": 3, "ignore_eos": True},
        b"  ",
        {"prompt_token_ids": [5, 6, 7], "id": {"k": [1]}, "temperature": 0, "max_tokens": 2, "ignore_eos": True},
        {"prompt": "the", "temperature": 2.0, "top_k": 50, "logit_bias": {"20": 1.5}},
        {"prompt": "the", "prompt_token_ids": [1], "id": "two"},
        {"id": "none"},
        {"prompt": "the", "temprature": 1},
        {"prompt": "the", "max_tokens": 0},
        {"prompt": "the", "stop": 5},
        {"prompt": ""},
        {"prompt": 7},
        {"prompt_token_ids": [5, 100000]},
        {"prompt_token_ids": "the"},
        {"prompt_token_ids": [5] * 500},
        {"messages": "the"},
        {"messages": []},
        {"prompt": "\ud800", "id": "\ud800"},
        b'{"prompt": "the"',
        b'{"prompt": "the", "temperature": NaN}',
        b"\xff\xfe",
        b"[1]",
        b"[" * 100_000,
        {"prompt": "last"},
    ]
    said = run(rows, "--max-tokens", "5", "--temperature", "0.7")
    found = {row["row"]: row for row in read(tmp_path / "out.jsonl")}
    assert sorted(found) == [number for number in range(len(rows)) if number != 2]
    good = {number for number, row in found.items() if "error" not in row}
    assert good == {0, 1, 3, 4, 23}
    assert found[0]["id"] == "a" and len(found[1]["token_ids"]) == 3 and found[3]["id"] == {"k": [1]}
    assert found[3]["num_prompt_tokens"] == 3 and found[3]["finish_reason"] == "length"
    assert found[5]["id"] == "two" and "exactly one of" in found[5]["error"]["message"]
    assert "did you mean 'temperature'" in found[7]["error"]["message"]
    assert found[8]["error"]["field"] == "max_tokens"
    assert found[12]["error"]["field"] == "prompt_token_ids"
    assert "23 rows, 18 of them errors" in said
    again = {**found}
    (tmp_path / "out.jsonl").rename(tmp_path / "first.jsonl")
    run(None, "--max-tokens", "5", "--temperature", "0.7")
    assert {row["row"]: row for row in read(tmp_path / "out.jsonl")} == again, "seeds depend on the row alone"


def test_killed_at_random_moments(start, run, tmp_path):
    """SIGKILL, sometimes with a torn line put after it: in the end every row stands there once, with its own tokens."""
    rng = random.Random(7)
    count = 400
    rows = [{"prompt_token_ids": [3 + i % 256, 3 + i // 256], "max_tokens": rng.randint(1, 24)} for i in range(count)]
    rows[13] = {"prompt": 5}
    output = tmp_path / "out.jsonl"
    process = start(rows, "--ignore-eos", "--temperature", "0", "--window", "32")
    kills = 0
    while process.poll() is None and kills < 2:
        goal = (output.read_bytes().count(b"\n") if kills else 0) + rng.randint(5, 120)
        while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < goal):
            time.sleep(0.01)
        if process.poll() is not None:
            break
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        data = output.read_bytes()
        if data.endswith(b"\n") and kills == 2:  # a write that was cut short
            line = data.splitlines()[0]
            output.write_bytes(data + line[: rng.randrange(1, len(line))])
        process = start(None, "--ignore-eos", "--temperature", "0", "--window", "32")
    finish(process)
    assert kills == 2
    found = read(output)
    assert sorted(row["row"] for row in found) == list(range(count))
    for row in found:
        assert ("error" in row) == (row["row"] == 13)
        assert row["row"] == 13 or len(row["token_ids"]) == rows[row["row"]]["max_tokens"]
    before = output.read_bytes()
    assert "nothing to do: 400 rows are done" in run(None)
    assert output.read_bytes() == before


def test_the_output_is_guarded(script, tmp_path):
    path = tmp_path / "out.jsonl"
    first = script.Output(path, 0.0)
    with pytest.raises(ConfigError, match="another process"):
        script.Output(path, 0.0)
    first.write(2, {"id": "\ud800"})
    first.write(0, {"id": "é"})
    first.close()
    assert [(row["row"], row["id"]) for row in read(path)] == [(2, "\ud800"), (0, "é")]
    for torn in (b"{", b'{"row": 1', b'{"row": 1, "id": null}'):
        whole = path.read_bytes()
        path.write_bytes(whole + torn)
        opened = script.Output(path, 1.0)
        assert [row for row in range(4) if row in opened.done] == [0, 2]
        opened.close()
        assert path.read_bytes() == whole
    for foreign in (b"no newline", b"a line\n", b"[]\n", b'{"row": "x"}\n'):
        path.write_bytes(foreign)
        with pytest.raises(ConfigError, match="line 1 is none of this program's"):
            script.Output(path, 1.0)
        assert path.read_bytes() == foreign, "another's file stays as it is"


def test_done_rows_take_a_bit_each(script):
    done = script.DoneRows()
    for row in (0, 9, 1_000_000, 9):
        done.add(row)
    assert done.count == 3 and 9 in done and 8 not in done and 10**12 not in done
    assert len(done._bits) == 125_001


def test_fields_over_defaults(script):
    from jaxllm import SamplingParams

    defaults = SamplingParams(max_tokens=9, temperature=0.5)
    params = script.params_of({"prompt": "x", "max_tokens": 3, "logit_bias": {"7": 1}}, defaults, 4, 0)
    assert (params.max_tokens, params.temperature, params.logit_bias) == (3, 0.5, {7: 1})
    assert params.seed == script.params_of({}, defaults, 4, 0).seed != script.params_of({}, defaults, 5, 0).seed
    assert script.params_of({"seed": 8}, defaults, 4, 0).seed == 8
    with pytest.raises(InvalidRequestError, match="no such field"):
        script.check_fields({"prompt": "x", "n": 2})

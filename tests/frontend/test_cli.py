"""`jaxllm generate` and `jaxllm chat`, in this process and as a process of their own."""

import contextlib
import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from jaxllm import LLM, EngineConfig, SamplingParams
from jaxllm.cli.app import app
from jaxllm.cli.flags import num_devices
from jaxllm.cli.start import prompt_length
from jaxllm.cli.stream import since_process_start
from jaxllm.errors import ConfigError, InvalidRequestError, JaxllmError
from tests.engine import tiny

SIZES = ["--token-rungs", "4,128", "--max-num-batched-tokens", "128", "--page-size", "8", "--no-warm-up"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
COMMAND = [sys.executable, "-c", "from jaxllm.cli import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tiny.write_checkpoint("llama", tmp_path_factory.mktemp("cli"), max_position_embeddings=256)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return str(directory)


@pytest.fixture(scope="module")
def expected(model):
    """Greedy text after a prompt of text, 12 tokens."""
    with LLM(
        model, max_num_seqs=1, max_num_batched_tokens=128, token_rungs=(4, 128), page_size=8, warm_up=False
    ) as llm:

        def get(prompt: str, num_tokens: int = 12) -> str:
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            return llm.generate(prompt, params)[0].outputs[0].text

        yield get


def run(*arguments: str, input: str = ""):
    return CliRunner().invoke(app, list(arguments), input=input, catch_exceptions=False)


def test_generate_streams_one_prompt(model, expected):
    flags = ["--model", model, "--max-tokens", "12", "--ignore-eos", *SIZES]
    result = run("generate", "the hand", *flags)
    assert result.exit_code == 0
    assert result.stdout == expected("the hand") + "\n"
    assert re.search(r"12 tokens, [\d.]+ tokens/s, first token after [\d.]+ s", result.stderr)
    assert run("generate", "--quiet", *flags, input="the hand").output == expected("the hand") + "\n"


def test_generate_runs_several_prompts_at_once(model, expected):
    result = run("generate", "the", "her", "--model", model, "--max-tokens", "12", "--ignore-eos", *SIZES)
    assert result.stdout == f"--- the\n{expected('the')}\n\n--- her\n{expected('her')}\n"


def test_sampling_flags_reach_the_sampler(model):
    flags = ["generate", "the", "--quiet", "--model", model, "--max-tokens", "20", "--ignore-eos", *SIZES]
    first, again, other = (run(*flags, "--temperature", "1.5", "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other
    whole = run(*flags).stdout
    stop = whole[3:5]
    assert run(*flags, "--stop", "\0", "--stop", stop).stdout == whole[: whole.index(stop)] + "\n"


def test_chat_keeps_history(model, expected):
    flags = ["chat", model, "--quiet", "--max-tokens", "6", "--ignore-eos", "--system", "on", *SIZES]
    result = run(*flags, input="the\nhe\n/reset\n\nthe\n/nothing\n/exit\nnot read\n")
    first = expected("<s>on<u>the<a>", 6)
    second = expected(f"<s>on<u>the<a>{first}<u>he<a>", 6)
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert "/nothing: no such command" in result.stderr
    assert run(*flags, "--prompt", "the").stdout == first + "\n"


def test_chat_survives_a_message_that_does_not_fit(model):
    flags = ["chat", model, "--quiet", "--max-tokens", "4", "--ignore-eos", *SIZES]
    result = run(*flags, input="x" * 400 + "\nthe\n")
    assert "at most 255" in result.stderr and "/reset" in result.stderr
    assert result.exit_code == 0 and len(result.stdout.splitlines()) >= 1
    with pytest.raises(InvalidRequestError):
        run(*flags, "--prompt", "x" * 400)


@pytest.mark.parametrize(
    "flags, kind, words",
    [
        (["--temperature", "-3"], InvalidRequestError, "temperature=-3.0"),
        (["--page-size", "0"], ConfigError, "page_size=0"),
        (["--model", "no/such/model"], JaxllmError, "no/such/model"),
    ],
)
def test_bad_input_is_named(model, flags, kind, words):
    with pytest.raises(kind, match=re.escape(words)):
        run("generate", "the", "--model", model, *flags)


def test_every_engine_option_is_a_flag():
    text = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "300"}).output
    for field in dataclasses.fields(EngineConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert EngineConfig.__dataclass_fields__["page_size"].metadata["help"] in text
    assert "sample from the smallest set of tokens" in text
    assert run("generate", "the", "--token-rungs", "a,b").exit_code == 2


def test_other_engines_names_are_flags_of_every_command(model, expected):
    root = typer.main.get_command(app)
    bench = root.commands["bench"].commands
    commands = [root.commands[name] for name in ("generate", "chat", "serve", "run-batch", "plan")]
    for command in [*commands, *(bench[name] for name in ("throughput", "latency", "serve", "all"))]:
        flags = {option.name: option.opts for option in command.params}
        for field, *names in (
            ("tensor_parallel_size", "--tensor-parallel-size", "-tp"),
            ("data_parallel_size", "--data-parallel-size", "-dp"),
            ("page_size", "--page-size", "--block-size"),
            ("memory_utilization", "--memory-utilization", "--gpu-memory-utilization"),
        ):
            assert flags[field] == names, command.name
    others = ["-tp", "1", "-dp=1", "--block-size", "16", "--gpu-memory-utilization", "0.5"]
    result = run("generate", "the hand", "--model", model, "--max-tokens", "12", "--ignore-eos", *SIZES, *others)
    assert result.stdout == expected("the hand") + "\n"
    for flags, words in (
        (["-tp", "3"], "tensor_parallel_size=3"),
        (["-dp", "0"], "data_parallel_size=0"),
        (["--block-size", "0"], "page_size=0"),
        (["--gpu-memory-utilization", "2"], "memory_utilization=2.0"),
    ):
        with pytest.raises(ConfigError, match=words):
            run("generate", "the", "--model", model, *SIZES, *flags)


def test_devices_are_counted_before_the_command_line_is_parsed():
    for words, count in (
        ("generate the", 1),
        ("chat -tp 2 --data-parallel-size=3", 6),
        ("chat --tensor-parallel-size 4 -tp=2", 2),
        ("chat -tp", 1),
        ("chat -tp many -dp 2", 2),
        ("generate -- -tp 4", 1),
    ):
        assert num_devices(words.split()) == count, words


def test_helpers():
    assert prompt_length("") == 1 and 20 <= prompt_length("a" * 80) <= 40
    assert 0 < since_process_start() < 86400


def test_a_process_of_its_own(model, expected, root):
    """Streams, says how it went and leaves at once."""
    flags = ["generate", "the hand", "--model", model, "--max-tokens", "12", "--ignore-eos", *SIZES]
    done = subprocess.run([*COMMAND, *flags], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, expected("the hand") + "\n")
    assert "after the start of the process" in done.stderr


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_bars_are_for_a_terminal(model, expected, root, quiet):
    """On stderr alone, and not with --quiet."""
    ours, theirs = pty.openpty()
    flags = ["--model", model, "--max-tokens", "12", "--ignore-eos", *SIZES, *["--quiet"] * quiet]
    process = subprocess.Popen(
        [*COMMAND, "generate", "the", "her", *flags],
        cwd=root,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    seen = b""
    try:
        with contextlib.suppress(OSError):  # how a terminal ends
            while block := os.read(ours, 4096):
                seen += block
        assert process.stdout.read() == f"--- the\n{expected('the')}\n\n--- her\n{expected('her')}\n"
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(ours)
    assert (b"Loading weights" in seen) == (b"Generating" in seen) == (b"tok/s" in seen) == (not quiet)


def test_an_error_is_one_line_and_status_2(monkeypatch, capsys):
    from jaxllm import cli

    monkeypatch.setattr(sys, "argv", ["jaxllm", "generate", "the", "--model", "no/such/model"])
    assert cli._run() == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert said.err.startswith("jaxllm: model='no/such/model'")


def test_interrupting_an_answer_leaves_the_conversation(model, root):
    """Ctrl-C at a terminal ends a long answer; the next line is read."""
    ours, theirs = pty.openpty()
    flags = ["chat", model, "--ignore-eos", "--max-tokens", "200", *SIZES]
    process = subprocess.Popen([*COMMAND, *flags], cwd=root, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    seen = b""

    def until(words: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while words not in seen:
            assert time.monotonic() < deadline, seen
            seen += os.read(ours, 4096)
        seen = seen.split(words, 1)[1]

    try:
        until(b"> ")
        os.write(ours, b"the\n")
        until(b"the\r\n")
        while not seen.strip():  # the first text of the answer
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        until(b"tokens")
        until(b"> ")
        os.write(ours, b"/exit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)

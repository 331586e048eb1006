"""Servers for tests/clients, in jaxllm's environment: prints their addresses, and ends with its standard input.

- "tiny": `jaxllm serve` of a tiny model with random weights; wants the key KEY.
- "parrot": its answer is the last message it was sent, so that a test decides what the model says.
- "narrow": a slow parrot with room for one request; all others get status 429.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from jaxllm.bench.stub_engine import stub_engine
from jaxllm.checkpoint import open_checkpoint
from jaxllm.engine.messages import AddRequest
from jaxllm.frontend.engine import FrontEngine
from tests.engine import tiny
from tests.serving.harness import running, write_chat_model

KEY = "sesame"
PARSERS = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
ENGINE = ["--max-num-seqs=8", "--max-num-batched-tokens=128", "--token-rungs=8,128", "--page-size=8", "--no-warm-up"]
_SAID = re.compile(r"<[sudt]>((?:(?!<[sudt]>).)*)<a>", re.DOTALL)


def parrot(model: str, **options: float) -> FrontEngine:
    """An engine that repeats the last message."""
    tokenizer = open_checkpoint(model, None).tokenizer()

    def reply(request: AddRequest) -> list[int]:
        prompt = tokenizer.decode(request.prompt_token_ids, skip_special_tokens=True)
        return [*tokenizer.encode(_SAID.findall(prompt)[-1], add_special_tokens=False), tiny.EOS]

    engine = stub_engine(tokenizer, reply, **options)
    engine.builder.eos_token_ids = frozenset({tiny.EOS})
    return engine


@contextlib.contextmanager
def served(model: str, port: int):
    """`jaxllm serve` as a process."""
    command = [
        sys.executable,
        "-c",
        "from jaxllm.cli import main; main()",
        "serve",
        model,
        f"--port={port}",
        "--served-model-name=tiny",
    ]
    process = subprocess.Popen([*command, f"--api-key={KEY}", "--tool-call-parser=hermes", *ENGINE], stdout=sys.stderr)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    import socket

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen) -> None:
    """Until it is ready. Raises RuntimeError if it ends before."""
    while process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"jaxllm serve ended with status {process.returncode}")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        model, port = write_chat_model(Path(directory)), free_port()
        process = stack.enter_context(served(model, port))
        narrow = parrot(model, max_num_seqs=1, steps_per_second=100)
        urls = {
            "parrot": stack.enter_context(running(parrot(model), served_model_name=["parrot"], **PARSERS)).url,
            "narrow": stack.enter_context(running(narrow, served_model_name=["parrot"], max_queued_requests=0)).url,
            "tiny": f"http://127.0.0.1:{port}",
        }
        wait_for(urls["tiny"], process)
        print(json.dumps(urls), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()

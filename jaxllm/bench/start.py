"""`jaxllm bench all`, part start: a new process from nothing to its first token, with an empty and a full cache.

`python -m jaxllm.bench.start` is that process. It reads one JSON object (model, options, prompt_length, and the time of
its start) and prints another.
"""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxllm.errors import EngineDeadError

PROMPT_LENGTH = 100
NUM_TOKENS = 8


@dataclasses.dataclass
class StartResult:
    """Seconds since the process started.

    Attributes:
      cache: "empty" or "full": what the compilation cache held.
      imported: jaxllm and JAX are imported and have found the device.
      ready: `LLM(...)` has returned: weights are there, the first executables are being compiled.
      first_token: of one request of 100 tokens.
      answered: its eight tokens are there.
      compiled: every executable of the engine is there, `num_executables` of them.
      engine_start: `LLM(...)` and the first token, imports not counted: what other engines call their start.
    """

    cache: str
    imported: float
    ready: float
    first_token: float
    answered: float
    compiled: float
    num_executables: int
    engine_start: float


@dataclasses.dataclass
class StartReport:
    """What the process says: its times, and what it ran on."""

    result: StartResult
    device: str
    num_devices: int
    dtype: str


def measure_start(model: str, options: dict[str, Any], directory: Path, cache: str) -> StartReport:
    """Starts the process with `directory` as its compilation cache. This process must hold no accelerator meanwhile.

    Raises:
      EngineDeadError: it failed; what it printed went to stderr.
    """
    wanted = {
        "model": model,
        "options": {**options, "compilation_cache_dir": str(directory), "warm_up": False},
        "cache": cache,
        "begin": time.time(),
    }
    command = [sys.executable, "-m", "jaxllm.bench.start"]
    done = subprocess.run(command, input=json.dumps(wanted), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise EngineDeadError(f"the process that measures the start has ended with status {done.returncode}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return StartReport(StartResult(**answer.pop("result")), **answer)


def _start(model: str, options: dict[str, Any], cache: str, begin: float) -> StartReport:
    import jax

    from jaxllm.bench.models import bench_model
    from jaxllm.bench.session import greedy
    from jaxllm.core.expected import Expected
    from jaxllm.engine.platform import configure
    from jaxllm.engine.resolve import resolve_dtype
    from jaxllm.llm import LLM

    configure(options.get("tensor_parallel_size", 1) * options.get("data_parallel_size", 1))
    device = jax.devices()[0].device_kind
    imported = time.time() - begin
    with bench_model(model, options) as (path, options), LLM(path, expected=Expected(PROMPT_LENGTH), **options) as llm:
        ready = time.time() - begin
        stream = llm.stream([5] * PROMPT_LENGTH, greedy(NUM_TOKENS))
        next(stream)
        first = time.time() - begin
        for _ in stream:
            pass
        answered = time.time() - begin
        num_executables = llm.warm_up()
        compiled = time.time() - begin
        result = StartResult(cache, imported, ready, first, answered, compiled, num_executables, first - imported)
        config = llm.config
        return StartReport(result, device, config.num_devices, resolve_dtype(config).name)


def main() -> None:
    """Reads what to start from stdin and prints a `StartReport` as the last line of stdout."""
    print(json.dumps(dataclasses.asdict(_start(**json.load(sys.stdin)))), flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""How much of a step is the host's own work: the real engine over a device that answers at once.

    PYTHONPATH=. python scripts/bench_host.py [--rows 1 64 256] [--steps 300]

The scheduler, the packing, the runner's bookkeeping, the messages and the front end are the engine's own; only the
executables are replaced by ones that return ready arrays. Prints microseconds a step: medians by part, and the 50th and
99th percentile of the whole, for decode steps and for the step that admits all prompts at once.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from jaxllm import LLM, SamplingParams
from jaxllm.engine.executables import Forward, Sample, UpdatePages
from jaxllm.engine.messages import decode, encode
from jaxllm.engine.step import OUTPUT_COLUMNS

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


class InstantExecutables:
    """Stands in for `Executables`: everything is ready, and what is run returns at once."""

    num_late = 0

    def __init__(self) -> None:
        self._outputs: dict[int, jax.Array] = {}

    def first_ready(self, keys: list[Any]) -> Any:
        return keys[0]

    def ready(self, key: Any) -> bool:
        return True

    def prepare(self, keys: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def get(self, key: Any) -> Any:
        if isinstance(key, Forward):
            return lambda leaves, caches, state, history, packed: (caches, state, None, None, None)
        if isinstance(key, Sample):
            if key.num_rows not in self._outputs:
                output = np.zeros((key.num_rows, OUTPUT_COLUMNS), np.int32)
                output[:, 0], output[:, 1], output[:, 4] = 7, 1, 1  # a token, accepted, finite
                self._outputs[key.num_rows] = jax.device_put(output)
            return lambda leaves, hidden, rows, history, extra: (history, self._outputs[key.num_rows])
        if isinstance(key, UpdatePages):
            return lambda tables, updates: tables
        raise NotImplementedError(f"{key} is not part of this measurement")


class Clock:
    """Seconds spent in named parts during the present step, and of all steps before."""

    def __init__(self) -> None:
        self.now: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []

    def time(self, owner: Any, method: str, part: str) -> None:
        """Counts the time of `owner.method` under `part`."""
        original, now = getattr(owner, method), self.now

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                now[part] += time.perf_counter() - begin

        object.__setattr__(owner, method, timed)

    def end_step(self) -> None:
        self.steps.append(dict(self.now))
        self.now.clear()


PARTS = ("schedule", "pack", "launch, rest", "read", "finish", "core, rest", "front end", "encode", "decode")


def parts_of(step: dict[str, float]) -> dict[str, float]:
    """A step's exclusive times."""
    found = {name: step.get(name, 0.0) for name in ("schedule", "pack", "read", "finish", "encode", "decode")}
    found["launch, rest"] = step.get("launch", 0.0) - found["pack"]
    inside = found["schedule"] + step.get("launch", 0.0) + found["read"] + found["finish"]
    found["core, rest"] = step.get("core", 0.0) - inside
    found["front end"] = step["turn"] - step.get("core", 0.0)
    return found


def measure(llm: LLM, clock: Clock, rows: int, steps: int, prompt_length: int, cached: bool) -> None:
    """Runs `rows` requests of `steps` tokens through the front door."""
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False)
    rng = np.random.default_rng(rows)
    prompts = rng.integers(3, CONFIG["vocab_size"], (rows, prompt_length)).tolist()
    llm.reset_prefix_cache()
    if cached:
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False))
    clock.now.clear()
    clock.steps.clear()
    begin = time.perf_counter()
    llm.generate(prompts, params)
    seconds = time.perf_counter() - begin
    # A prompt's step is one in which something was admitted; the rest are decodes.
    decodes = clock.steps[-steps + 10 : -2]
    total = sorted(step["turn"] for step in decodes)
    parts = [parts_of(step) for step in decodes]
    cells = [f"{1e6 * statistics.median(part[name] for part in parts):8.0f}" for name in PARTS]
    if os.environ.get("WORST"):
        worst = max(decodes, key=lambda s: s["turn"])
        print({k: round(1e6 * v) for k, v in parts_of(worst).items()})
    p50, p99 = total[len(total) // 2], total[int(len(total) * 0.99)]
    first = max(step.get("schedule", 0.0) for step in clock.steps[:-steps])
    print(
        f"{rows:5d} {prompt_length:6d}",
        *cells,
        f"{1e6 * p50:8.0f} {1e6 * p99:8.0f} {1e3 * max(total):8.2f} {1e3 * first:10.2f} {seconds:7.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=300, help="tokens of each request")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--cached", action="store_true", help="all prompts are in the prefix cache")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(CONFIG))
        llm = LLM(
            directory,
            load_format="dummy",
            max_num_seqs=256,
            max_num_batched_tokens=8192,
            token_rungs=(1, 8, 32, 64, 128, 192, 256, 512, 1024, 2048, 4096, 8192),
            page_size=64,
            warm_up=False,
        )
    core = llm._client._core  # type: ignore[attr-defined]
    core.runner.executables.wait()  # else its threads take part of the time
    core.runner.executables = InstantExecutables()
    clock = Clock()
    clock.time(core, "step", "core")
    clock.time(core.schedulers[0], "schedule", "schedule")
    clock.time(core.schedulers[0], "finish", "finish")
    clock.time(core.runner, "launch", "launch")
    clock.time(core.runner, "read", "read")
    clock.time(core.runner.layout, "pack", "pack")
    original = llm._receive

    def turn() -> Any:
        begin = time.perf_counter()
        news = original()
        clock.now["turn"] = time.perf_counter() - begin
        clock.end_step()
        return news

    llm._receive = turn  # type: ignore[method-assign]
    receive = llm._client.receive

    def received(timeout: float) -> Any:
        messages = receive(timeout)
        if options.messages:
            begin = time.perf_counter()
            sent = [encode(message) for message in messages]
            middle = time.perf_counter()
            messages = [decode(message) for message in sent]
            clock.now["encode"], clock.now["decode"] = middle - begin, time.perf_counter() - middle
        return messages

    llm._client.receive = received  # type: ignore[method-assign]
    options.messages = True
    titles = ("rows", "prompt", *PARTS, "p50", "p99", "max ms", "admit ms", "s")
    print(" ".join(f"{t:>{w}}" for t, w in zip(titles, (5, 6, *[8] * 11, 8, 10, 7), strict=True)))
    for rows in options.rows:
        measure(llm, clock, rows, options.steps, options.prompt, options.cached)
    llm.close()


if __name__ == "__main__":
    main()

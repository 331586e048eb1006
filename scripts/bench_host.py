#!/usr/bin/env python3
"""How much of a step is the host's own work: the real engine over a device that answers at once.

    PYTHONPATH=. python scripts/bench_host.py [--rows 1 64 256] [--steps 300] [--prompt 128] [--cached]

The front door, the scheduler, the packing, the runner's bookkeeping and the messages are the engine's own, the transfer
of the packed array included; only the executables are replaced by functions that return ready arrays, so that what JAX
takes to call an executable is left out. One process; encoding and decoding of messages are measured beside.

Prints microseconds a step of decodes: medians by part, the median, the 99th percentile and the largest of the whole;
then in milliseconds the longest step that admitted prompts, and of it what `schedule` took. With --device-ms, steps
take that long on a device that only pretends; its busy share shows whether the host keeps out of its way.
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
from jaxllm.engine.executables import Forward, Sample, Stage, UpdatePages
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
PARTS = ("schedule", "pack", "launch", "read", "finish", "core", "front end", "encode", "decode")  # exclusive times


class Device:
    """Runs one step after the other, each for `step_seconds`; launching one takes `launch_seconds` of the host."""

    def __init__(self, step_seconds: float, launch_seconds: float):
        self.step_seconds, self.launch_seconds = step_seconds, launch_seconds
        self.restart()

    def restart(self) -> None:
        """Forgets what ran."""
        self.begin = self.end = self.busy = 0.0

    def launch(self) -> float:
        """Starts a step; when it will have ended."""
        now = time.perf_counter()
        while time.perf_counter() < now + self.launch_seconds:
            pass
        start = max(time.perf_counter(), self.end)
        self.begin = self.begin or start
        self.end = start + self.step_seconds
        self.busy += self.step_seconds
        return self.end

    @property
    def busy_share(self) -> float:
        """From the first launch to the end of the last step."""
        return self.busy / max(self.end - self.begin, 1e-9)


class Output:
    """A step's output, there when the device has ended it."""

    def __init__(self, values: np.ndarray, ready: float):
        self._values, self._ready = values, ready

    def copy_to_host_async(self) -> None:
        pass

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        wait = self._ready - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        return self._values


class InstantExecutables:
    """Stands in for `Executables`: everything is ready, and what is run returns at once."""

    num_late = 0

    def __init__(self, device: Device) -> None:
        self._device = device
        self._outputs: dict[int, np.ndarray] = {}

    def first_ready(self, keys: list[Any]) -> Any:
        return keys[0]

    def prepare(self, keys: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def get(self, key: Any) -> Any:
        if isinstance(key, Forward):
            return lambda leaves, caches, state, buffers, history, packed, peers: (
                caches,
                state,
                buffers,
                history,
                None,
            )
        if isinstance(key, Stage):
            return lambda old, packed: jax.device_put(packed)
        if isinstance(key, Sample):
            if key.num_rows not in self._outputs:
                output = np.zeros((key.num_rows, OUTPUT_COLUMNS), np.int32)
                output[:, 0], output[:, 1], output[:, 4] = 7, 1, 1  # a token, accepted, finite
                self._outputs[key.num_rows] = output
            values = self._outputs[key.num_rows]
            return lambda leaves, hidden, rows, history, extra, masks: (history, Output(values, self._device.launch()))
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

        object.__setattr__(owner, method, timed)  # the layout is a frozen dataclass

    def count(self, owner: Any, method: str, part: str) -> None:
        """Notes under `part` how many rows of the batch that `owner.method` returns have just got their slot."""
        original, now = getattr(owner, method), self.now

        def counted(*args: Any) -> Any:
            batch = original(*args)
            now[part] += len(batch.new_slots) if batch else 0
            return batch

        setattr(owner, method, counted)

    def end_step(self) -> None:
        self.steps.append(defaultdict(float, self.now))
        self.now.clear()


def exclusive(step: dict[str, float]) -> dict[str, float]:
    """A step's times by PARTS, what is inside another part taken out of it."""
    inside_core = step["schedule"] + step["launch"] + step["read"] + step["finish"]
    return {
        **{name: step[name] for name in ("schedule", "pack", "read", "finish", "encode", "decode")},
        "launch": step["launch"] - step["pack"],
        "core": step["core"] - inside_core,
        "front end": step["turn"] - step["core"] - step["encode"] - step["decode"],
    }


def instrument(llm: LLM, clock: Clock, device: Device) -> None:
    """Replaces the engine's executables and counts its parts."""
    core = llm._client._core  # type: ignore[attr-defined]
    core.runner.executables.wait()  # else its threads take part of the time
    core.runner.device.executables = InstantExecutables(device)
    clock.count(core.schedulers[0], "schedule", "admitted")
    clock.time(core.schedulers[0], "schedule", "schedule")
    clock.time(core.schedulers[0], "finish", "finish")
    clock.time(core.runner, "launch", "launch")
    clock.time(core.runner, "read", "read")
    clock.time(core.runner.layout, "pack", "pack")
    clock.time(core, "step", "core")
    receive, turn = llm._client.receive, llm._receive

    def receive_coded(timeout: float) -> Any:
        messages = receive(timeout)
        middle = time.perf_counter()
        sent = [encode(message) for message in messages]
        end = time.perf_counter()
        found = [decode(data) for data in sent]
        clock.now["encode"], clock.now["decode"] = end - middle, time.perf_counter() - end
        return found

    def timed_turn() -> Any:
        begin = time.perf_counter()
        news = turn()
        clock.now["turn"] = time.perf_counter() - begin
        clock.end_step()
        return news

    llm._client.receive = receive_coded  # type: ignore[method-assign]
    llm._receive = timed_turn  # type: ignore[method-assign]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def measure(llm: LLM, clock: Clock, device: Device, rows: int, steps: int, prompt_length: int, cached: bool) -> str:
    """Runs `rows` requests of `steps` tokens through the front door; a line of figures."""
    prompts = np.random.default_rng(rows).integers(3, CONFIG["vocab_size"], (rows, prompt_length)).tolist()
    llm.reset_prefix_cache()
    if cached:
        llm.generate(prompts, greedy(1))
    clock.now.clear()
    clock.steps.clear()
    device.restart()
    llm.generate(prompts, greedy(steps))
    last = max(i for i, step in enumerate(clock.steps) if step["admitted"])
    decodes = clock.steps[last + 3 : -3]
    parts = [exclusive(step) for step in decodes]
    whole = sorted(1e6 * step["turn"] for step in decodes)
    cells = [1e6 * statistics.median(part[name] for part in parts) for name in PARTS]
    cells += [whole[len(whole) // 2], whole[int(len(whole) * 0.99)], whole[-1]]
    admission = max((step for step in clock.steps if step["admitted"]), key=lambda step: step["turn"])
    text = "".join(f"{cell:10.0f}" for cell in cells)
    admit = f"{1e3 * admission['turn']:10.2f}{1e3 * admission['schedule']:10.2f}"
    return f"{rows:5d}{text}{admit}" + (f"{device.busy_share:10.1%}" if device.step_seconds else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256], help="requests that run at once")
    parser.add_argument("--steps", type=int, default=300, help="tokens of each request")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--cached", action="store_true", help="all prompts are in the prefix cache")
    parser.add_argument("--device-ms", type=float, default=0, help="what a step takes on the pretended device")
    parser.add_argument("--launch-ms", type=float, default=0, help="what launching one takes of the host beside")
    options = parser.parse_args()
    rungs = (1, 8, 32, 64, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
    sizes: dict[str, Any] = dict(max_num_seqs=256, max_num_batched_tokens=8192, token_rungs=rungs, page_size=64)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(CONFIG))
        llm = LLM(directory, load_format="dummy", warm_up=False, **sizes)
    clock = Clock()
    with llm:
        device = Device(options.device_ms / 1e3, options.launch_ms / 1e3)
        instrument(llm, clock, device)
        titles = (*PARTS, "p50", "p99", "max", "admit ms", "schedule", *(["busy"] if device.step_seconds else []))
        print(f"{'rows':>5}" + "".join(f"{title:>10}" for title in titles))
        for rows in options.rows:
            print(measure(llm, clock, device, rows, options.steps, options.prompt, options.cached), flush=True)


if __name__ == "__main__":
    main()

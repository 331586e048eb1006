"""vLLM on the GPU workloads, with random weights, as rows of jaxllm/bench/peers.json.

Run in an environment with vLLM, one model a process, so that each start is a whole one:

    python scripts/peers/vllm_gpu.py llama-3.1-8b --output rows.json
    python scripts/peers/vllm_gpu.py llama-3.1-8b --rate 4 --rate 12 --runs 3 --output rows.json
    python scripts/peers/vllm_gpu.py llama-3.3-70b --tensor-parallel-size 2 --workload single_stream --output rows.json

Its defaults but for max_model_len=18432, detokenization (off) and what weights are; the prefix cache is emptied before
each run, of which the fastest counts; online figures are the medians of the runs. Rows are on disk as soon as they are
there. With --rate it is the asynchronous engine with the server's defaults.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import vllm
from common import workloads
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

MAX_MODEL_LEN = 18432


class Rows:
    """A file of rows; those of earlier runs stay."""

    def __init__(self, path: Path, model: str, devices: int):
        self._path = path
        self._rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        self._who = {
            "engine": f"vLLM {vllm.__version__}",
            "device": torch.cuda.get_device_name(0),
            "devices": devices,
            "model": model,
        }

    def add(self, workload: str, **figures: Any) -> None:
        self._rows.append({**self._who, "workload": workload, **figures})
        self._path.write_text("[\n" + ",\n".join(map(json.dumps, self._rows)) + "\n]\n")
        print(self._rows[-1], flush=True)


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def offline(options: dict[str, Any], names: Sequence[str], runs: int, vocab_size: int, rows: Rows) -> None:
    begin = time.perf_counter()
    llm = LLM(**options)
    rows.add("engine_start", seconds=round(time.perf_counter() - begin, 1))
    work = workloads()
    llm.generate(
        [TokensPrompt(prompt_token_ids=p) for p, _ in work.uniform(99, vocab_size, 8, 128, 16)],
        greedy(16),
        use_tqdm=False,
    )
    for name in names:
        requests = {**work.WORKLOADS, **work.STATIC_WORKLOADS}[name](vocab_size)
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in requests]
        params = [greedy(count) for _, count in requests]
        seconds = []
        for _ in range(runs):
            assert llm.reset_prefix_cache()
            begin = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds.append(time.perf_counter() - begin)
            for output, (_, count) in zip(outputs, requests, strict=True):
                assert len(output.outputs[0].token_ids) == count
        tokens_out, tokens_in = sum(count for _, count in requests), sum(len(prompt) for prompt, _ in requests)
        rows.add(
            name,
            seconds=round(min(seconds), 3),
            output_tok_s=round(tokens_out / min(seconds), 1),
            total_tok_s=round((tokens_in + tokens_out) / min(seconds), 1),
            runs=[round(each, 3) for each in seconds],
        )


def percentile(values: Sequence[float], share: float) -> float:
    """Between the nearest two values, linearly, as jaxllm.bench.latency has it."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)


async def one_run(llm: AsyncLLM, arrivals: Sequence[tuple[float, list[int], int]], run: str) -> dict[str, float]:
    """Milliseconds and tokens/s, as `jaxllm bench serve` counts them."""
    begin = time.perf_counter()

    async def one(index: int) -> tuple[float, list[float]]:
        at, prompt, count = arrivals[index]
        await asyncio.sleep(max(begin + at - time.perf_counter(), 0))
        arrival, times, seen = time.perf_counter(), [], 0
        async for output in llm.generate(
            TokensPrompt(prompt_token_ids=prompt), greedy(count), request_id=f"{run}-{index}"
        ):
            if len(output.outputs[0].token_ids) > seen:
                seen = len(output.outputs[0].token_ids)
                times.append(time.perf_counter())
        assert seen == count
        return arrival, times

    results = await asyncio.gather(*map(one, range(len(arrivals))))
    seconds = time.perf_counter() - begin
    ttft = [times[0] - arrival for arrival, times in results]
    tpot = [(t[-1] - t[0]) / (count - 1) for (_, t), (_, _, count) in zip(results, arrivals, strict=True) if count > 1]
    itl = [b - a for _, t in results for a, b in itertools.pairwise(t)]
    figures = {
        "ttft_p50_ms": percentile(ttft, 50),
        "ttft_p99_ms": percentile(ttft, 99),
        "tpot_p50_ms": percentile(tpot, 50),
        "tpot_p99_ms": percentile(tpot, 99),
        "itl_p99_ms": percentile(itl, 99),
    }
    return {name: value * 1e3 for name, value in figures.items()} | {
        "output_tok_s": sum(count for _, _, count in arrivals) / seconds
    }


async def online(options: dict[str, Any], rates: Sequence[float], runs: int, vocab_size: int, rows: Rows) -> None:
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(**options, disable_log_stats=True), usage_context=UsageContext.OPENAI_API_SERVER
    )
    arrivals = workloads().poisson_arrivals
    await one_run(llm, arrivals(vocab_size, 1000.0, 8, 512, 16), "first")
    for rate in rates:
        found = []
        for run in range(runs):
            assert await llm.reset_prefix_cache()
            found.append(await one_run(llm, arrivals(vocab_size, rate), f"{rate}-{run}"))
        medians = {name: round(statistics.median(each[name] for each in found), 2) for name in found[0]}
        rows.add("poisson_arrivals", rate=rate, **medians, runs=runs)
    llm.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    work = workloads()
    parser.add_argument("model", choices=list(work.MODEL_SHAPES))
    parser.add_argument("--workload", action="append", help="may be given again (default: all that fit the model)")
    parser.add_argument("--rate", type=float, action="append", help="requests/s; may be given again")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--layers", type=int, help="of the model, the first ones alone")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    shape, name = dict(work.MODEL_SHAPES[given.model]), given.model
    if given.layers:
        shape["num_hidden_layers"], name = given.layers, f"{name}-{given.layers}-layers"
    rows = Rows(given.output, name, given.tensor_parallel_size)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(shape))
        options = {
            "model": directory,
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": "bfloat16",
            "max_model_len": min(MAX_MODEL_LEN, shape["max_position_embeddings"]),
            "gpu_memory_utilization": 0.9,
            "tensor_parallel_size": given.tensor_parallel_size,
        }
        if given.rate:
            asyncio.run(online(options, given.rate, given.runs, shape["vocab_size"], rows))
        else:
            offline(options, given.workload or list(work.WORKLOADS), given.runs, shape["vocab_size"], rows)


if __name__ == "__main__":
    main()

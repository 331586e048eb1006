"""Two data-parallel ranks on two simulated devices give one rank's tokens."""

import json
import os
import subprocess
import sys

import pytest

from jaxllm import LLM, SamplingParams, StructuredOutputsParams
from jaxllm.errors import ConfigError
from tests.engine import tiny

PAGES = 17  # of a rank: for one request of the longest kind


def work() -> list[tuple[list[int], SamplingParams]]:
    """Enough for both ranks, unevenly; and one alone, so that a rank has nothing to do."""
    return [(prompt, tiny.mixed_params(i)) for i, prompt in enumerate(tiny.prompts(32))]


def results(llm: LLM) -> dict:
    asked = work()
    outputs = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    wide = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2, logprobs=-1, n=2)
    alone = llm.generate(asked[0][0], wide)[0]
    form = SamplingParams(seed=5, max_tokens=9, structured_outputs=StructuredOutputsParams(regex="([a-c]{3}-)+"))
    formed = llm.generate([prompt for prompt, _ in asked[:5]], [form, form, asked[2][1], form, form])
    again = llm.generate([asked[i][0] for i in (4, 5)], SamplingParams(temperature=0, max_tokens=4))
    grown = [SamplingParams(temperature=i % 2, seed=i, max_tokens=40, ignore_eos=True) for i in range(16)]
    growing = llm.generate(tiny.prompts(16, 5, longest=8), grown)  # a small cache takes many of them, then lacks pages
    same = [list(range(100, 124))] * 2  # three pages, on every rank
    cached = [llm.generate(same, SamplingParams(temperature=0, max_tokens=4)) for _ in range(2)]
    vectors = llm.embed([prompt for prompt, _ in asked])
    return {
        "largest dimensions": [max(range(tiny.HIDDEN), key=lambda i: abs(v.outputs.embedding[i])) for v in vectors],
        "tokens": [output.outputs[0].token_ids for output in outputs],
        "reasons": [output.outputs[0].finish_reason for output in outputs],
        "alone": [sample.token_ids for sample in alone.outputs],
        "prompt ids": [sorted(entry) for entry in alone.prompt_logprobs[1:]],
        "best": [next(iter(entry)) for sample in alone.outputs for entry in sample.logprobs],
        "formed": [output.outputs[0].token_ids for output in formed],
        "again": [output.outputs[0].token_ids for output in again],
        "growing": [output.outputs[0].token_ids for output in growing],
        "cached": [output.outputs[0].token_ids for outputs in cached for output in outputs],
        "hits": [output.num_cached_tokens for output in cached[1]],
    }


def main(checkpoint: str) -> None:
    """In a process of its own: two devices must be asked for before JAX starts."""
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    sizes = dict(max_num_seqs=16, max_num_batched_tokens=32, token_rungs=(4, 32))
    sizes |= dict(kv_cache_memory_bytes=PAGES * tiny.LAYERS * 2 * tiny.KV_HEADS * 8 * tiny.HEAD_DIM * 4)
    with tiny.llm(checkpoint, data_parallel_size=2, **sizes) as llm:
        found = results(llm)
        core = llm._client._core  # type: ignore[attr-defined]
        found["ranks"] = [scheduler._num_added for scheduler in core.schedulers]
        found["preemptions"] = [scheduler.num_preemptions for scheduler in core.schedulers]
        found["left"] = [scheduler.kv_cache.usage for scheduler in core.schedulers]
    print(json.dumps(found))


def test_two_ranks_give_the_tokens_of_one(engine, checkpoint, root):
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tests.engine.test_data_parallel", checkpoint("llama")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert min(found.pop("ranks")) >= 12 and found.pop("left") == [0, 0]
    assert min(found.pop("preemptions")) > 0
    expected = results(engine())
    assert found.pop("hits") == expected.pop("hits") == [16, 16]
    assert found == expected


def test_more_ranks_than_devices_are_refused(checkpoint):
    import jax

    count = len(jax.devices())
    with pytest.raises(ConfigError, match=rf"data_parallel_size={count + 1}: there are {count} devices"):
        tiny.llm(checkpoint("llama"), data_parallel_size=count + 1)


if __name__ == "__main__":
    main(sys.argv[1])

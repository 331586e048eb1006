"""Tensor-parallel shards on simulated devices give one device's tokens, through the collectives that ARCHITECTURE.md
names and no others."""

import collections
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams, StructuredOutputsParams
from jaxllm.config import EngineConfig
from jaxllm.engine import build
from jaxllm.engine.executables import Pool, Sample, Wide, WriteMasks
from jaxllm.engine.sampling import VARIANTS
from jaxllm.errors import ConfigError
from jaxllm.models import decoder
from jaxllm.models.registry import model_class
from pallas_kernels.argmax_projection.reference import argmax_projection as likeliest
from sharding import DATA, EXPERT, TENSOR
from tests.engine import tiny

HEADS = {
    "eight": dict(num_attention_heads=8, num_key_value_heads=2),
    "nine": dict(num_attention_heads=9, num_key_value_heads=3),  # SmolLM2's
}
SMALL = dict(max_num_seqs=8, max_num_batched_tokens=8, token_rungs=(4, 8))  # prompts go in chunks
WINDOWED = dict(max_num_batched_tokens=32, token_rungs=(4, 32))  # here too; slots enough for a cache of all windows
# Model, heads, tensor shards, ranks, whether the cache is so small that requests are preempted, further options.
Case = tuple[str, str, int, int, bool, dict]
QUICK: dict[str, Case] = {
    "tensor 4 x data 2, chunks": ("llama", "eight", 4, 2, False, SMALL),
}
# The other meshes, on tokens alone: prompts in chunks of 8 tokens, and from the cache, some of a cache for few.
TOKENS = dict(max_num_seqs=8, max_num_batched_tokens=8, token_rungs=(8,))
LEAN: dict[str, Case] = {
    f"{heads}, tensor {tensor} x data {data}": ("llama", heads, tensor, data, is_tight, TOKENS | options)
    for heads, tensor, data, is_tight, options in (
        ("eight", 2, 1, False, {}),
        ("eight", 4, 1, False, {}),
        ("eight", 8, 1, True, {}),
        ("eight", 2, 2, True, {}),
        ("eight", 2, 4, False, {}),
        ("nine", 3, 1, True, dict(decode_rungs=(8,))),
    )
}
DEALT_OUT = "tensor 4, the residual stream dealt out"  # as over GPUs that reach each other's memory
LEAN[DEALT_OUT] = LEAN["eight, tensor 4 x data 1"]
LIKELIEST = "tensor 8, greedy tokens without logits"  # as on TPU; 300 tokens are no multiple of the shards
LEAN[LIKELIEST] = LEAN["eight, tensor 8 x data 1"]
SLOW: dict[str, Case] = {
    f"{kind}, {heads}, tensor {tensor} x data {data}": (kind, heads, tensor, data, is_tight, options)
    for kind, is_tight, options in (("llama", True, {}), ("mistral", False, WINDOWED), ("gemma2", False, {}))
    for heads, tensor, data in (
        ("eight", 2, 1),
        ("eight", 4, 1),
        ("eight", 8, 1),
        ("nine", 3, 1),
        ("eight", 2, 2),
        ("eight", 2, 4),
        ("eight", 4, 2),
        ("nine", 3, 2),
    )
}


CASES = QUICK | LEAN | SLOW


def directory_of(root: Path, case: Case) -> Path:
    """The checkpoint, written at its first use."""
    kind, heads, *_ = case
    directory = root / f"{kind}-{heads}"
    return directory if directory.exists() else tiny.write_checkpoint(kind, directory, **HEADS[heads])


def open_case(root: Path, case: Case, *, shards: bool) -> LLM:
    """Its engine, or that on one device."""
    _, heads, tensor, data, is_tight, options = case
    if shards:
        options = options | dict(tensor_parallel_size=tensor, data_parallel_size=data)
    if is_tight:  # pages for one request of max_model_len
        kv_heads = HEADS[heads]["num_key_value_heads"]
        kv_heads = max(1, kv_heads // tensor) if shards else kv_heads
        options = options | dict(kv_cache_memory_bytes=17 * tiny.LAYERS * 2 * kv_heads * 8 * tiny.HEAD_DIM * 4)
    return tiny.llm(directory_of(root, case), **options)


def of_the_cache(llm: LLM, case: Case) -> dict:
    """A prompt that every rank gets, twice, the second time cached, even where others would have taken its pages; its
    tokens, the hits, and how often each rank has preempted by now."""
    prompts = [list(range(100, 124))] * 4  # three pages
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    first, second = (llm.generate(prompts, params) for _ in range(2))
    schedulers = llm._client._core.schedulers  # type: ignore[attr-defined]
    return {
        "cached": [output.outputs[0].token_ids for output in first + second],
        "hits": [output.num_cached_tokens for output in second],
        "preemptions": [scheduler.num_preemptions for scheduler in schedulers],
    }


def assert_cached_and_preempted(case: Case, found: dict, expected: dict) -> None:
    """What the cases claim: that prompts were cached on every rank, and where the cache is for few, each preempted."""
    assert found["cached"] == expected["cached"] and len(set(map(tuple, found["cached"]))) == 1
    assert min(found["hits"]) >= 16 and min(expected["hits"]) >= 16  # two pages
    assert len(found["preemptions"]) == case[3] and len(expected["preemptions"]) == 1
    assert not case[4] or min(found["preemptions"] + expected["preemptions"]) > 0


def assert_hits(case: Case, found: int, expected: int) -> None:
    """Of the same batch again, unless others have taken its pages. A rank finds only what it has computed itself."""
    if not case[4]:
        assert found > 0 and expected > 0
        assert found == expected or case[3] > 1


def outcome(llm: LLM, case: Case) -> dict:
    """Tokens, reasons and logprobs of a mixed batch, twice (the second time most prompts are cached), and of one
    request with wide logprobs. In a tight cache many start, then all of them grow."""
    prompts = tiny.prompts(16, 5, longest=8) if case[4] else tiny.prompts(32)
    params = [tiny.mixed_params(i, **(dict(max_tokens=60) if case[4] else {})) for i in range(len(prompts))]
    rounds = [llm.generate(prompts, params) for _ in range(2)]
    wide = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, logprobs=-1, n=2)
    alone = llm.generate(prompts[4], wide)[0]
    form = SamplingParams(seed=5, max_tokens=9, structured_outputs=StructuredOutputsParams(regex="([a-c]{3}-)+"))
    formed = llm.generate(prompts[:4], form)
    entries = [entry for sample in alone.outputs for entry in sample.logprobs] + alone.prompt_logprobs[1:]
    entries += [entry for output in rounds[0] for entry in output.outputs[0].logprobs or []]
    return {
        "tokens": [output.outputs[0].token_ids for output in rounds[0]],
        "again": [output.outputs[0].token_ids for output in rounds[1]],
        "reasons": [output.outputs[0].finish_reason for output in rounds[0]],
        "again hits": sum(output.num_cached_tokens for output in rounds[1]),
        "cache": of_the_cache(llm, case),
        "formed": [output.outputs[0].text for output in formed],
        "alone": [sample.token_ids for sample in alone.outputs],
        "ids": [list(entry) for entry in entries],
        "ranks": [[logprob.rank for logprob in entry.values()] for entry in entries],
        "logprobs": [[logprob.logprob for logprob in entry.values()] for entry in entries],
    }


def tokens(llm: LLM, case: Case) -> dict:
    """Greedy and seeded tokens, twice, and what the cache did."""
    prompts = tiny.prompts(12, 5, longest=8 if case[4] else 40)
    length = 60 if case[4] else 12
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=length, ignore_eos=True) for i in range(12)]
    rounds = [llm.generate(prompts, params) for _ in range(2)]
    return {
        "tokens": [[output.outputs[0].token_ids for output in outputs] for outputs in rounds],
        "again hits": sum(output.num_cached_tokens for output in rounds[1]),
        "cache": of_the_cache(llm, case),
    }


COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter)(?:-start)?\(")


def collectives(llm: LLM, *, of_samplers: bool = True) -> dict[str, dict[str, int]]:
    """How many arrays each kind moves in the optimized HLO of what has been compiled (XLA joins independent ones), and
    of what reads hidden rows and, if asked, of a sampler of each variant."""
    executables = llm._client._core.runner.executables  # type: ignore[attr-defined]
    executables.prepare([Pool(), Wide(8, 2)])
    if of_samplers:
        executables.prepare([*(Sample(1, variant) for variant in VARIANTS), WriteMasks(1)])
    futures = executables._futures
    found: dict[str, dict[str, int]] = {}
    for key, future in futures.items():
        counts = found[str(key)] = collections.Counter()
        for result, kind in COLLECTIVE.findall(future.result().as_text()):
            counts[kind] += result.count("[")
    return found


def main(root: Path, names: list[str]) -> None:
    """In a process of its own: eight devices must be asked for before JAX starts."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    stream_axis, has_kernel = build.stream_axis, decoder.argmax.has_kernel
    decoder.argmax.argmax_projection = lambda *arrays, backend, **options: likeliest(*arrays, **options)
    for name in names:
        case = CASES[name]
        build.stream_axis = (lambda mesh, backend, config: TENSOR) if name == DEALT_OUT else stream_axis
        decoder.argmax.has_kernel = (lambda *_, **__: True) if name == LIKELIEST else has_kernel
        with open_case(root, case, shards=True) as llm:
            made = tokens(llm, case) if name in LEAN else outcome(llm, case)
            found = collectives(llm, of_samplers=name not in LEAN)
            print(json.dumps({"outcome": made, "collectives": found}), flush=True)


def found_by(root: Path, here: Path, names: list[str]) -> list[dict]:
    """What the cases give on eight devices."""
    for name in names:
        directory_of(root, CASES[name])
    paths = [str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tests.engine.test_tensor_parallel", str(root), *names]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def quick(tmp_path_factory, root) -> tuple[Path, dict[str, dict]]:
    directory = tmp_path_factory.mktemp("models")
    names = [*QUICK, *LEAN]
    return directory, dict(zip(names, found_by(directory, root, names), strict=True))


@pytest.fixture(scope="module")
def on_one_device(quick) -> dict[tuple[str, bool], dict]:
    """By heads and whether the cache is tight."""
    expected = {}
    for (_, heads, _, _, is_tight, _), case in ((case, case) for case in LEAN.values()):
        if (heads, is_tight) not in expected:
            with open_case(quick[0], case, shards=False) as llm:
                expected[heads, is_tight] = tokens(llm, case)
    return expected


def assert_as_on_one_device(root: Path, case: Case, found: dict) -> None:
    with open_case(root, case, shards=False) as llm:
        expected = outcome(llm, case)
    assert_cached_and_preempted(case, found["outcome"].pop("cache"), expected.pop("cache"))
    assert_hits(case, found["outcome"].pop("again hits"), expected.pop("again hits"))
    values = found["outcome"].pop("logprobs"), expected.pop("logprobs")
    assert found["outcome"] == expected
    assert expected["tokens"] == expected["again"]
    for one, other in zip(*values, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("name", QUICK)
def test_the_tokens_of_one_device(name, quick):
    root, found = quick
    assert_as_on_one_device(root, QUICK[name], found[name])


@pytest.mark.parametrize("name", LEAN)
def test_the_tokens_of_one_device_on_every_mesh(name, quick, on_one_device):
    case = LEAN[name]
    found, expected = quick[1][name]["outcome"], on_one_device[case[1], case[4]]
    assert found["tokens"] == expected["tokens"] and expected["tokens"][0] == expected["tokens"][1]
    assert_cached_and_preempted(case, found["cache"], expected["cache"])
    assert_hits(case, found["again hits"], expected["again hits"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_tokens_of_one_device_for_all_sizes(name, tmp_path, root):
    (found,) = found_by(tmp_path, root, [name])
    assert_as_on_one_device(tmp_path, SLOW[name], found)
    assert_collectives(name, found["collectives"])


def expected_collectives(key: str, ranks: int) -> dict[str, int]:
    """What ARCHITECTURE.md names, as XLA:CPU counts it: a loop's body counts once."""
    if key.startswith("Forward"):
        return {"all-reduce": 1 + 2 * tiny.LAYERS}
    if key.startswith("Wide"):
        return {"all-reduce": 4 + (ranks > 1), "all-gather": 1}
    if key.startswith("Pool"):
        return {"all-reduce": 1} if ranks > 1 else {}
    if not key.startswith("Sample"):
        return {}
    sums = 0
    if "random=True" in key:
        sums += 1  # the largest
    if "filters=True" in key:
        sums += 1 + 1 + 2  # both bisections, and the mass of the whole
    if "adjust=True" in key:
        sums += 1  # the largest of the raw logits
    if "num_logprobs=20" in key:
        sums += 4
    gathers = 1 + ("num_logprobs=20" in key)
    return {"all-reduce": sums, "all-gather": gathers} if sums else {"all-gather": gathers}


def assert_collectives(name: str, found: dict[str, dict[str, int]]) -> None:
    for key, counts in found.items():
        expected = expected_collectives(key, CASES[name][3])
        if name == DEALT_OUT and key.startswith("Forward"):  # a gather beside every sum: on GPUs one kernel for both
            expected |= {"all-gather": expected["all-reduce"]}
        assert counts == expected, key
    kinds = collections.Counter(key.split("(")[0] for key in found)
    assert min(kinds[kind] for kind in ("Forward", "Sample", "Wide", "Pool")) >= 1
    if name not in LEAN:
        assert kinds["Sample"] >= len(VARIANTS) and kinds["Upload"] >= 3


@pytest.mark.parametrize("name", [*QUICK, *LEAN])
def test_no_collectives_but_those_that_are_named(name, quick):
    found = quick[1][name]["collectives"]
    assert_collectives(name, found)
    if name in QUICK:
        assert sum(key.startswith("Forward") for key in found) >= 2


@pytest.mark.parametrize(
    ("axis", "sizes", "processes", "backend", "options"),
    [
        (TENSOR, (1, 1, 4), 1, "gpu", {}),
        (None, (1, 1, 4), 1, "gpu", dict(disable_custom_all_reduce=True)),
        (None, (1, 1, 4), 2, "gpu", {}),
        (None, (2, 1, 2), 1, "gpu", {}),
        (None, (1, 1, 1), 1, "gpu", {}),
        (None, (1, 1, 4), 1, "tpu", {}),
    ],
)
def test_where_the_stream_may_be_dealt_out(axis, sizes, processes, backend, options):
    """Over the GPUs of one process, if nobody forbids it."""
    devices = np.array(
        [SimpleNamespace(process_index=i % processes, local_hardware_id=i) for i in range(math.prod(sizes))]
    )
    mesh: Any = SimpleNamespace(
        shape=dict(zip((DATA, EXPERT, TENSOR), sizes, strict=True)), size=devices.size, devices=devices
    )
    assert build.stream_axis(mesh, backend, EngineConfig(**options)) == axis


def test_more_shards_than_devices_are_refused(checkpoint):
    import jax

    if len(jax.devices()) > 1:
        pytest.skip("this machine has them")
    with pytest.raises(ConfigError, match="tensor_parallel_size=2: there are 1 devices"):
        tiny.llm(checkpoint("llama"), tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="data_parallel_size=2 times tensor_parallel_size=4: there are 1 devices"):
        tiny.llm(checkpoint("llama"), tensor_parallel_size=4, data_parallel_size=2)


@pytest.mark.parametrize(
    ("devices", "group", "sizes", "told"),
    [
        (1, None, (1, 2), "tensor_parallel_size=2: there are 1 devices; data × tensor may be at most 1 × 1"),
        (2, None, (3, 1), "data_parallel_size=3: there are 2 devices; data × tensor may be at most 2 × 1, 1 × 2"),
        (
            6,
            None,
            (4, 2),
            "data_parallel_size=4 times tensor_parallel_size=2: there are 6 devices; "
            "data × tensor may be at most 6 × 1, 3 × 2, 1 × 4",
        ),
        (
            6,
            None,
            (1, 3),
            "tensor_parallel_size=3: must divide num_attention_heads=4 and intermediate_size=48, and divide "
            "num_key_value_heads=2 or be a multiple of it; this model allows 1, 2, 4; on 6 devices data × tensor may "
            "be at most 6 × 1, 3 × 2, 1 × 4",
        ),
        (
            6,
            SimpleNamespace(size=2),
            (1, 2),
            "data_parallel_size=1 times tensor_parallel_size=2: 2 processes have 6 devices, and all must be used: "
            "3 × 2, 6 × 1",
        ),
        (
            12,
            SimpleNamespace(size=2),
            (4, 3),
            "tensor_parallel_size=3: must divide num_attention_heads=4 and intermediate_size=48, and divide "
            "num_key_value_heads=2 or be a multiple of it; this model allows 1, 2, 4; on 12 devices 3 × 4, 6 × 2, "
            "12 × 1",
        ),
    ],
)
def test_a_refused_mesh_names_those_that_would_do(monkeypatch, devices, group, sizes, told):
    monkeypatch.setattr(build.jax, "devices", lambda: [None] * devices)
    hf = tiny.CONFIGS["llama"]
    config = EngineConfig(data_parallel_size=sizes[0], tensor_parallel_size=sizes[1])
    with pytest.raises(ConfigError) as refused:
        build._mesh(config, model_class(hf).parse_config(hf), group)
    assert str(refused.value) == told


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

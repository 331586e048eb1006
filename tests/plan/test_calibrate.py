"""A calibration is found again from runs that it times, and holds for others."""

import dataclasses
import random

import pytest

from jaxllm.bench.throughput import workload
from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError
from jaxllm.plan import calibrate
from jaxllm.plan.chips import calibration_of, chip, read_calibration
from jaxllm.plan.fit import Model, clock, fit
from jaxllm.plan.simulate import steps
from jaxllm.plan.times import Step
from jaxllm.plan.workloads import predict_workload
from tests.plan.shapes import model

H100 = chip("h100")
TRUTH = calibration_of(H100)
OPTIONS = dict(max_model_len=18432, token_rungs=(256, 512, 1024, 2048, 4096, 8192), decode_rungs=(2, 16, 64, 128, 256))
MODELS = "llama-3.1-8b", "qwen3-0.6b"


def timed(large: Model, noise: float, tensor: int = 1) -> list[calibrate.Run]:
    """Runs that take as long as H100's calibration says, give or take some."""
    rng = random.Random(0)
    fitted = fit(large, H100, EngineConfig(model="any", **OPTIONS), data=1, tensor=tensor)
    bare, times = clock(large, H100, None, tensor), clock(large, H100, TRUTH, tensor)
    runs = []
    for title, requests in calibrate.runs_of(large.config.vocab_size, 18432):
        made = list(steps(requests, fitted.scheduler, fitted.groups, fitted.decode_rungs))
        each = [times.predict(step) for step in made]
        seconds = sum(each) * (1 + rng.uniform(-noise, noise))
        host = TRUTH.host_step_seconds * len(made)
        alone = 0.7 * TRUTH.host_step_seconds  # before the first step and behind the last
        tokens = sum(len(prompt) for prompt, _ in requests)
        bound = sum(each) <= 1.05 * host  # then the host works all the time
        admission = TRUTH.host_prompt_token_seconds * tokens
        title = f"{large.name}, {title}, {tensor}"
        works = seconds if bound else alone * len(made)
        runs.append(calibrate.Run(title, bare, made, seconds + works / len(made), works, tokens, admission))
    return runs


def attention() -> list[calibrate.AttentionTime]:
    """Kernels of one layer of Llama 3.1 8B that take as long as H100's calibration says."""
    large = model("llama-3.1-8b")
    nothing = dict(layer_seconds=0.0, layer_passes=0.0, step_seconds=0.0, sampler_seconds=0.0, host_step_seconds=0.0)
    known = dataclasses.replace(TRUTH, gemm=((1.0, float("inf")),), **nothing)
    bare, times = clock(large, H100, None, 1), clock(large, H100, known, 1)
    made = [calibrate.AttentionTime(bare, rows, 1.0) for rows in calibrate.ATTENTION.values()]
    return [dataclasses.replace(each, seconds=times.predict(each.step) / 32) for each in made]


@pytest.fixture(scope="module")
def runs() -> dict[float, list[calibrate.Run]]:
    return {0.0: [run for name in MODELS for run in timed(model(name), 0.0)]}


@pytest.fixture(scope="module")
def found(runs) -> calibrate.Calibration:
    return calibrate.solve(H100, runs[0.0], attention(), TRUTH.bandwidth, ["made up"])


@pytest.mark.parametrize(("noise", "allowed"), [(0.0, 0.02), pytest.param(0.03, 0.09, marks=pytest.mark.slow)])
def test_other_work_is_predicted(runs, noise, allowed):
    measured = runs[0.0] if noise == 0 else [run for name in MODELS for run in timed(model(name), noise)]
    found = calibrate.solve(H100, measured, attention(), TRUTH.bandwidth, [])
    off = calibrate.errors(found, measured)
    assert max(map(abs, off.values())) < allowed and len(off) == sum(run.is_of_device for run in measured) > 30
    for name in MODELS:
        large = model(name)
        fitted = fit(large, H100, EngineConfig(model="any", max_model_len=18432), data=1, tensor=1)
        for which in ("single_stream", "decode_heavy", "random_1024_128"):
            asked = workload(which, large.config.vocab_size)
            expected, made = (
                predict_workload(which, asked, fitted, clock(large, H100, known, 1)).seconds.predicted
                for known in (TRUTH, found)
            )
            assert made == pytest.approx(expected, rel=allowed), (name, which)


def test_a_file_of_it_is_a_calibration(found, tmp_path):
    calibrate.write(calibrate.with_source(found, "twice"), tmp_path / "h100.json")
    again = read_calibration(tmp_path / "h100.json")
    assert again.sources == ("made up", "twice") and again.chip == "h100"
    assert again.decode_bandwidth == pytest.approx(found.decode_bandwidth, rel=1e-3)
    assert [rows for rows, _ in again.gemm] == [rows for rows, _ in found.gemm]
    speeds = [speed for _, speed in again.gemm]
    assert speeds == sorted(speeds, reverse=True), "more rows take no less time"


def test_without_a_sum_over_shards_nothing_is_predicted_for_them(found):
    step = Step(contexts=[5, 6], num_sampled=2)
    assert found.all_reduce_seconds is None
    assert clock(model("llama-3.1-8b"), H100, found, 2).predict(step) is None
    assert clock(model("llama-3.1-8b"), H100, found, 1).predict(step) > 0


def test_sums_over_shards_are_told_from_runs_over_shards(runs):
    both = [*runs[0.0], *timed(model("llama-3.1-8b"), 0.0, tensor=2)]
    found = calibrate.solve(H100, both, attention(), TRUTH.bandwidth, [])
    assert found.all_reduce_seconds == pytest.approx(TRUTH.all_reduce_seconds, rel=0.2)
    assert max(map(abs, calibrate.errors(found, both).values())) < 0.02


def test_errors_are_of_runs_that_are_predicted(runs, found):
    over_shards = timed(model("llama-3.1-8b"), 0.0, tensor=2)[:3]
    assert found.all_reduce_seconds is None and any(run.is_of_device for run in over_shards)
    assert calibrate.errors(found, [*runs[0.0], *over_shards]) == calibrate.errors(found, runs[0.0])


def test_what_cannot_be_told_is_refused(runs):
    busy = [dataclasses.replace(run, host_seconds=run.seconds) for run in runs[0.0]]
    with pytest.raises(ConfigError, match="the host takes longer than the device for every run"):
        calibrate.solve(H100, busy, attention(), TRUTH.bandwidth, [])
    decodes = [run for run in runs[0.0] if all(not step.spans for step in run.steps[1:])][:1]
    with pytest.raises(ConfigError, match="do not tell products, keys and prompts apart"):
        calibrate.solve(H100, decodes, [], TRUTH.bandwidth, [])
    with pytest.raises(ConfigError, match="'NVIDIA T4': a calibration is of NVIDIA A100"):
        calibrate.chip_of("NVIDIA T4")
    assert calibrate.chip_of("NVIDIA H200").name == "h200"


def test_runs_that_are_too_long_are_left_out():
    names = [name for name, _ in calibrate.runs_of(100, 3000)]
    assert "1 × 8192 + 1" not in names and "1 × 2048 + 1" in names and "160 mixed" in names
    longest = [max(len(prompt) + count for prompt, count in requests) for _, requests in calibrate.runs_of(100, 3000)]
    assert max(longest) <= 3000

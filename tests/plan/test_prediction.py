"""Times: in general, and the prediction beside what was measured on an H100 and on H200s."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.bench.results import load_all
from jaxllm.bench.throughput import ThroughputResult, workload
from jaxllm.bench.workloads import MODEL_SHAPES, WORKLOADS
from jaxllm.cli.calibrate import SIZES
from jaxllm.config import EngineConfig
from jaxllm.plan.chips import calibration_of, chip, chips
from jaxllm.plan.fit import clock, fit, read_model
from jaxllm.plan.plan import make_plan, prompt_steps
from jaxllm.plan.times import Step
from jaxllm.plan.workloads import predict_workload
from tests.plan.shapes import model

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
H100 = chip("h100")
ANY = EngineConfig(model="any")
DEVICE_ALONE = dataclasses.replace(calibration_of(H100), host_step_seconds=0.0, host_prompt_token_seconds=0.0)


def measured() -> dict[tuple[str, str], ThroughputResult]:
    """Every workload that the repository has of one H100, by model and name."""
    found = {}
    for part in load_all([RESULTS]):
        if part.part == "throughput" and part.facts.device == H100.kind:
            assert part.facts.num_devices == 1 and part.facts.dtype == "bfloat16"
            assert part.facts.options["max_model_len"] == 18432
            found |= {(part.facts.model, result.workload): result for result in part.results}
    return found


MEASURED = measured()


def test_what_the_h100_is_predicted_beside():
    assert {name for name, _ in MEASURED} == {"llama-3.1-8b", "qwen3-0.6b"}
    assert {workload for name, workload in MEASURED if name == "llama-3.1-8b"} >= WORKLOADS.keys()
    assert {workload for name, workload in MEASURED if name == "qwen3-0.6b"} == WORKLOADS.keys() - {"long_context"}


@pytest.mark.parametrize(("name", "which"), MEASURED)
def test_the_h100_is_predicted_within_15_percent(name, which):
    found, made = MEASURED[name, which], predicted(name, which, H100, calibration_of(H100))
    assert made.seconds.predicted == pytest.approx(found.seconds, rel=0.15)
    assert made.seconds.floor < found.seconds
    assert (made.output_tokens, made.steps) == (found.output_tokens, found.steps)


@pytest.mark.parametrize("count", [1, 32, 128])
def test_times_to_tokens_are_those_of_a_batch_that_was_measured(count):
    """TTFT and TPOT as the plan's columns have them: a batch of so many takes the one and 63 times the other."""
    large, output = model("llama-3.1-8b"), 64
    known = calibration_of(H100)
    options = EngineConfig(model="llama-3.1-8b", max_model_len=18432, max_num_seqs=count)  # the plan has a row of it
    made = make_plan(large, H100, options, known, chips=1, context=128, output_len=output)
    batch = next(each for each in made.throughput.batches if each.requests == count)
    taken = MEASURED["llama-3.1-8b", f"static_batch_{count}"].seconds
    assert batch.ttft.predicted + (output - 1) * batch.tpot.predicted == pytest.approx(taken, rel=0.15)


@pytest.mark.parametrize("on", ["h100", "h200"])
def test_each_time_is_that_of_a_workload_that_is_almost_nothing_else(on):
    """Of prefill_heavy, 64 prompts of 4096 tokens and one token of each, all is TTFT; of single_stream, 512 tokens
    after one prompt, nearly all TPOT."""
    large, device = model("llama-3.1-8b"), chip(on)
    options = EngineConfig(model="llama-3.1-8b", max_model_len=18432, max_num_seqs=64)
    taken = {name: MEASURED["llama-3.1-8b", name].seconds for name in ("prefill_heavy", "single_stream")}
    if on == "h200":
        taken = {name: H200_MEASURED["llama-3.1-8b", name] for name in taken}

    def batch(count, context):
        made = make_plan(large, device, options, calibration_of(device), chips=1, context=context, output_len=512)
        return next(each for each in made.throughput.batches if each.requests == count)

    assert batch(64, 4096).ttft.predicted == pytest.approx(taken["prefill_heavy"], rel=0.15)
    assert 512 * batch(1, 128).tpot.predicted == pytest.approx(taken["single_stream"], rel=0.15)


# Seconds on one H200 (b6430fd, 2026-11-30, one run each), in the engines that its calibration had been taken with, in
# which none of these workloads is.
H200_MEASURED = {
    ("llama-3.1-8b", "single_stream"): 2.138,
    ("llama-3.1-8b", "shared_prefix"): 1.894,
    ("llama-3.1-8b", "decode_heavy"): 6.652,
    ("llama-3.1-8b", "prefill_heavy"): 6.115,
    ("llama-3.1-8b", "ragged"): 14.086,
    ("llama-3.1-8b", "random_1024_128"): 15.932,
    ("llama-3.1-8b", "long_context"): 10.893,
    ("qwen3-0.6b", "single_stream"): 0.681,
    ("qwen3-0.6b", "shared_prefix"): 0.431,
    ("qwen3-0.6b", "decode_heavy"): 2.468,
    ("qwen3-0.6b", "prefill_heavy"): 0.691,
    ("qwen3-0.6b", "ragged"): 5.732,
    ("qwen3-0.6b", "random_1024_128"): 3.560,
}


@pytest.mark.parametrize(("name", "which"), H200_MEASURED)
def test_the_h200_is_predicted_from_short_runs(name, which):
    """Within 15%, but for one: its prompts' common parts take the host and the device less than they are said to."""
    h200 = chip("h200")
    made = predicted(name, which, h200, calibration_of(h200), sizes=SIZES)
    off = made.seconds.predicted / H200_MEASURED[name, which] - 1
    assert abs(off) < (0.25 if (name, which) == ("qwen3-0.6b", "shared_prefix") else 0.15)
    assert made.seconds.floor < H200_MEASURED[name, which]


# Two H200 (f15efda, 2026-11-30), 16 layers of Llama 3.3 70B's width; the calibration has seen Llama 3.1 8B over two.
TWO_H200 = {"decode_heavy": 5.235, "shared_prefix": 1.714, "single_stream": 2.180, "prefill_heavy": 5.842}


@pytest.mark.parametrize("which", TWO_H200)
def test_two_h200_are_predicted_from_short_runs_of_another_model(which):
    h200 = chip("h200")
    shape = MODEL_SHAPES["llama-3.3-70b"] | {"num_hidden_layers": 16}
    part = read_model("16 layers", shape, "bfloat16")
    fitted = fit(part, h200, EngineConfig(model="x", max_model_len=18432, tensor_parallel_size=2), data=1, tensor=2)
    requests = workload(which, part.config.vocab_size)
    made = predict_workload(which, requests, fitted, clock(part, h200, calibration_of(h200), 2))
    assert made.seconds.floor < TWO_H200[which]
    assert made.seconds.predicted == pytest.approx(TWO_H200[which], rel=0.15)


def predicted(name, which, on, calibration, tensor=1, sizes=None):
    large = model(name)
    fitted = fit(large, on, EngineConfig(model=name, max_model_len=18432, **(sizes or {})), data=1, tensor=tensor)
    requests = workload(which, large.config.vocab_size)
    return predict_workload(which, requests, fitted, clock(large, on, calibration, tensor))


def test_no_step_is_shorter_than_the_host_takes_for_it():
    """Of two layers the device's part is the shorter one; all prompts are taken in before the first step."""
    small = model("small")
    known = dataclasses.replace(DEVICE_ALONE, host_step_seconds=1.0, host_prompt_token_seconds=2.0)
    one, many = Step(contexts=[5], num_sampled=1), Step(spans=[(0, 8192)] * 4000, num_sampled=4000)
    bare, times = clock(small, H100, DEVICE_ALONE, 1), clock(small, H100, known, 1)
    assert bare.predict(one) < 1.0 == times.predict(one)
    assert bare.predict(many) == times.predict(many) > 1.0
    assert (bare.predict_admission(100), times.predict_admission(100)) == (0.0, 200.0)
    requests = [([7] * 100, 3)] * 2
    for data in (1, 2):  # one host takes the prompts of all ranks in
        made = predict_workload("any", requests, fit(small, H100, ANY, data=data, tensor=1), times)
        assert made.seconds.predicted == 400.0 + made.steps
    batch = make_plan(small, H100, ANY, known, chips=2, tensor=1, context=100).throughput.batches[0]
    assert (batch.ttft.predicted, batch.tpot.predicted) == (201.0, 1.0)


def test_a_workloads_floor_has_the_sums_over_shards():
    """Those of `Clock.floor` over the same steps."""
    small = model("small")
    requests = [([7 + i] * 128, 20) for i in range(16)]
    prompts = Step(spans=[(0, 128)] * 16, num_sampled=16)
    decodes = [Step(contexts=[128 + i] * 16, num_sampled=16) for i in range(1, 20)]
    floors = []
    for tensor in (1, 4):
        times = clock(small, H100, None, tensor)
        made = predict_workload("any", requests, fit(small, H100, ANY, data=1, tensor=tensor), times)
        assert made.seconds.floor == pytest.approx(sum(map(times.floor, [prompts, *decodes])))
        floors.append(made.seconds.floor - times.sums(16 * (128 + 19)))
    assert times.sums(1) > 0 and floors[1] < made.seconds.floor
    assert floors[0] / 4 <= floors[1] < floors[0]


def test_ranks_share_a_workload():
    small = model("small")
    times = clock(small, H100, DEVICE_ALONE, 1)
    requests = [([7 + i] * 128, 20) for i in range(16)]  # steps of 512 and 2048 tokens, without padding
    fits = {data: fit(small, H100, ANY, data=data, tensor=1) for data in (1, 4)}
    one, four = (predict_workload("any", requests, fits[data], times) for data in (1, 4))
    assert four.seconds == predict_workload("any", requests[::4], fits[1], times).seconds
    assert four.seconds.predicted < one.seconds.predicted and four.output_tokens == one.output_tokens == 320


@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 100), (3, 100), (5, 64), (2, 200), (7, 33)])
def test_prompts_in_steps(count, length):
    steps = list(prompt_steps(count, length, (16, 64, 128)))
    assert sum(step.num_tokens for step in steps) == count * length
    assert sum(step.num_sampled for step in steps) == count
    assert all(step.num_tokens == 128 for step in steps[:-1])
    assert all(step.num_padded in (16, 64, 128) and step.num_padded >= step.num_tokens for step in steps)
    spans = [span for step in steps for span in step.spans]
    assert [start for start, _ in spans[1:]] == [0 if end == length else end for _, end in spans[:-1]]


def test_a_calibration_is_of_bfloat16():
    step = Step(contexts=[5, 6], num_sampled=2)
    assert clock(model("small", "float32"), H100, calibration_of(H100), 1).predict(step) is None
    assert clock(model("small"), H100, None, 1).predict(step) is None
    assert clock(model("small"), H100, calibration_of(H100), 1).predict(step) > 0


def test_common_keys_are_read_once_for_a_tile_of_rows():
    times = clock(model("small"), H100, DEVICE_ALONE, 1)
    apart = Step(contexts=[4000] * 64, num_sampled=64)
    shared = dataclasses.replace(apart, num_shared=63 * 3968)
    saved = (1 - 4 / 64) * 63 * 3968 * times.cost.kv_bytes  # tiles of 64 queries, 4 of them a row's
    read = times.calibration.decode_bandwidth
    assert times.predict(apart) - times.predict(shared) == pytest.approx(saved / read, rel=1e-4)


@given(
    st.sampled_from(sorted(chips())),
    st.integers(1, 16),
    st.integers(1, 2000),
    st.integers(1, 400),
    st.booleans(),
)
def test_times_make_sense(name, count, context, output_len, calibrated):
    known = dataclasses.replace(calibration_of(H100), chip=name) if calibrated else None
    made = make_plan(model("small"), chip(name), ANY, known, chips=count, context=context, output_len=output_len)
    assert made.throughput in made.meshes and made.latency in made.meshes
    for mesh in made.meshes:
        assert mesh.data == made.devices // mesh.tensor
        assert mesh.batches[-1].requests == mesh.max_requests
        for kind in ("ttft", "tpot"):
            times = [getattr(batch, kind) for batch in mesh.batches]
            floors = [each.floor for each in times]
            assert floors[0] > 0 and floors == sorted(floors)
            assert all((each.predicted is not None) == calibrated for each in times)
            if name == "h100" and calibrated:
                assert all(each.floor <= each.predicted for each in times)
        if mesh is not made.latency:
            assert mesh.batches[0].tpot.best >= made.latency.batches[0].tpot.best

"""Times: in general, and the prediction beside what was measured on an H100."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.bench.results import load_all
from jaxllm.bench.workloads import WORKLOADS
from jaxllm.config import EngineConfig
from jaxllm.plan.chips import calibration_of, chip, chips
from jaxllm.plan.fit import clock, fit
from jaxllm.plan.plan import make_plan, prompt_steps
from jaxllm.plan.times import Step
from jaxllm.plan.workloads import predict_workload
from tests.plan.shapes import model

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
H100 = chip("h100")
NAME = "llama-3.1-8b"
ANY = EngineConfig(model="any")


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    (part,) = [
        part
        for part in load_all([RESULTS])
        if (part.part, part.facts.model, part.facts.device) == ("throughput", NAME, H100.kind)
    ]
    assert part.facts.num_devices == 1 and part.facts.dtype == "bfloat16"
    return {result.workload: result.seconds for result in part.results}


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_h100_is_predicted_within_15_percent(name, measured):
    large = model(NAME)
    fitted = fit(large, H100, EngineConfig(model=NAME, max_model_len=18432), data=1, tensor=1)
    requests = WORKLOADS[name](large.config.vocab_size)
    made = predict_workload(name, requests, fitted, clock(large, H100, calibration_of(H100), 1))
    assert made.seconds.predicted == pytest.approx(measured[name], rel=0.15)
    assert made.seconds.floor < measured[name]
    assert made.output_tokens == sum(count for _, count in requests)


def test_ranks_share_a_workload():
    small = model("small")
    times = clock(small, H100, calibration_of(H100), 1)
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
    times = clock(model("small"), H100, calibration_of(H100), 1)
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

"""The workloads are what peers were measured on: they must never change."""

import pytest

from jaxllm.bench.models import bench_model
from jaxllm.bench.throughput import workload
from jaxllm.bench.workloads import (
    CPU_PREFILL,
    CPU_SINGLE,
    MODEL_SHAPES,
    OTHER_WORKLOADS,
    WORKLOADS,
    cpu_prefill,
    cpu_single,
    poisson_arrivals,
)
from jaxllm.errors import InvalidRequestError, ModelNotFoundError

# With a vocabulary of 49152: requests, input tokens, output tokens, first four ids of the first prompt, last three of
# the last.
GENERATED = {
    "single_stream": (1, 128, 512, [8815, 37313, 4145, 16726], [30099, 17657, 43212]),
    "random_1024_128": (512, 524288, 65536, [3716, 6012, 5572, 23672], [36789, 12263, 4491]),
    "ragged": (256, 146501, 154533, [38849, 35676, 8557, 24255], [9640, 35602, 38259]),
    "decode_heavy": (256, 32768, 131072, [15479, 19886, 6771, 47275], [11572, 632, 3548]),
    "prefill_heavy": (64, 262144, 64, [40832, 16750, 48623, 23506], [14673, 47005, 35136]),
    "shared_prefix": (256, 557056, 16384, [37615, 5290, 31797, 17155], [13290, 7385, 45799]),
    "long_context": (16, 262144, 4096, [21232, 9896, 25885, 42669], [11612, 45579, 33982]),
    "static_batch_1": (1, 128, 64, [31111, 17638, 43098, 34687], [13693, 22269, 18484]),
    "static_batch_32": (32, 4096, 2048, [31111, 17638, 43098, 34687], [4270, 10361, 9904]),
    "static_batch_128": (128, 16384, 8192, [31111, 17638, 43098, 34687], [14137, 23051, 7724]),
    "cpu_single": (1, 64, 128, [30353, 40197, 24475, 17516], [27844, 48259, 7353]),
    "cpu_prefill": (1, 1024, 1, [37457, 2145, 28117, 31635], [5137, 22463, 42506]),
    "cpu_ragged": (32, 5222, 2237, [36695, 30526, 29621, 33291], [38056, 30984, 8398]),
}


def test_every_workload_is_fixed():
    assert {**WORKLOADS, **OTHER_WORKLOADS}.keys() == GENERATED.keys()


@pytest.mark.parametrize("name", GENERATED)
def test_what_is_generated_is_fixed(name):
    requests = workload(name, 49152)
    figures = len(requests), sum(len(prompt) for prompt, _ in requests), sum(count for _, count in requests)
    assert (*figures, requests[0][0][:4], requests[-1][0][-3:]) == GENERATED[name]


def test_arrivals_are_fixed():
    arrivals = poisson_arrivals(49152, 12.0)
    assert arrivals[0][0] == pytest.approx(0.021424648709024368)
    assert arrivals[-1][0] == pytest.approx(20.148342408361927)
    assert arrivals[0][1][:4] == [8289, 12666, 46200, 2879]
    assert sum(len(prompt) for _, prompt, _ in arrivals) == 132621
    assert sum(count for *_, count in arrivals) == 32171


def test_cpu_workloads_are_the_single_prompts():
    assert cpu_single() == [CPU_SINGLE]
    assert cpu_prefill() == [(CPU_PREFILL, 1)]


def test_unknown_names_are_refused():
    with pytest.raises(InvalidRequestError, match="single_stream"):
        workload("no_such", 49152)
    with pytest.raises(InvalidRequestError, match="num_requests"):
        workload("cpu_single", 49152, 4)
    with pytest.raises(ModelNotFoundError, match="qwen3"), bench_model("shape:no-such", {}):
        pass


def test_shapes_become_directories():
    with bench_model("shape:qwen3-0.6b", {"page_size": 32}) as (path, options):
        from jaxllm.checkpoint import open_checkpoint

        assert open_checkpoint(path).config == MODEL_SHAPES["qwen3-0.6b"]
        assert options == {"page_size": 32, "load_format": "dummy", "max_model_len": 18432}

"""Floors against arithmetic by hand."""

import pytest

from jaxllm.bench import peers
from jaxllm.bench.floor import Ceilings, ModelCost, Work, common_prefix, floor_of, num_computed, phases
from jaxllm.bench.latency import percentile
from jaxllm.bench.workloads import MODEL_SHAPES, decode_heavy, shared_prefix, single_stream

LLAMA = ModelCost.from_config(MODEL_SHAPES["llama-3.1-8b"], 2)
H100 = Ceilings(3.01e12, 765e12)
TINY = {
    "vocab_size": 10,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
}


def test_a_tiny_model_by_hand():
    cost = ModelCost.from_config(TINY, 4)
    layer = 4 * 2 * (2 + 2 * 1) + 2 * 2 * 4 + 3 * 4 * 6  # qkv, o, mlp
    assert cost.layer_weights == cost.active_weights == 2 * layer
    assert cost.kv_bytes == 2 * 2 * 1 * 2 * 4
    weights = 2 * layer + 40
    prefill, first, second = phases(cost, [([1, 2, 3], 3)])
    assert prefill.bytes == weights * 4 + 3 * cost.kv_bytes
    tail = 2 * 2 * 4 + 3 * 4 * 6  # o and mlp of the last layer, for the last token alone
    assert prefill.flops == 2 * 3 * (2 * layer - tail) + 2 * (tail + 40) + (1 + 2 + 3) * 4 * 2 * 2 * 2
    assert first == Work(weights * 4 + 4 * cost.kv_bytes, 2 * weights + 4 * 4 * 2 * 2 * 2)
    assert second.bytes == weights * 4 + 5 * cost.kv_bytes


def test_windows_cap_what_a_layer_reads():
    cost = ModelCost.from_config(TINY, 4, windows=[None, 3])
    full = ModelCost.from_config(TINY, 4)
    assert full.decode([10]).bytes - cost.decode([10]).bytes == 7 * cost.kv_bytes / 2
    assert cost.prefill([(0, 2)], 1) == full.prefill([(0, 2)], 1)
    assert cost.prefill([(0, 9)], 1).flops < full.prefill([(0, 9)], 1).flops


def test_llama_8b_reads_15_gb_a_step():
    assert LLAMA.weight_bytes(1) == pytest.approx(15.0e9, rel=2e-3)
    floor = floor_of(LLAMA, single_stream(128256), H100)
    assert 512 / floor.seconds == pytest.approx(200, rel=0.02)


def test_floors_of_batches():
    # 0.6 s of prefill, then 512 steps of 5 ms of weights and 4.3 ms of keys and values
    assert floor_of(LLAMA, decode_heavy(128256), H100).seconds == pytest.approx(5.4, rel=0.03)
    # the system prompt is computed once and read once a step: 0.7 s of prefill, 63 steps of 5 ms of weights and 1.8 ms
    # of what is each request's own
    assert floor_of(LLAMA, shared_prefix(128256), H100).seconds == pytest.approx(1.13, rel=0.05)


def test_a_shared_prefix_is_read_by_one_of_those_who_are_left():
    cost = ModelCost.from_config(TINY, 4)
    requests = [([1, 2, 3, 4], 2), ([1, 2, 3, 5], 4), ([1, 2, 7], 3), ([8], 4)]
    _, *decode = phases(cost, requests)
    weights = cost.weight_bytes(1)
    contexts = [(5, 5, 4, 2), (6, 5, 3), (7, 4)]
    shared = [3 + 2, 2, 0]  # the first is gone in step 2, the third in step 3
    for work, seen, common in zip(decode, contexts, shared, strict=True):
        assert work.bytes == weights + (sum(seen) - common) * cost.kv_bytes


def test_tokens_of_all_phases():
    requests = [([1, 2, 3, 4], 2), ([1, 2, 3, 5], 4), ([1, 2, 7], 3), ([8], 4)]
    assert num_computed(requests) == (4 + 1 + 1 + 1) + (1 + 3 + 2 + 3)
    assert num_computed([([1, 2], 1), ([1, 2], 1)]) == 2 + 1  # the last token of a prompt is everyone's own


def test_experts_are_read_as_they_are_touched():
    cost = ModelCost.from_config(MODEL_SHAPES["qwen3-30b-a3b"], 2)
    assert cost.weight_bytes(1) == pytest.approx(2 * (cost.active_weights + cost.head_weights), rel=1e-6)
    assert cost.weight_bytes(4096) == pytest.approx(2 * (cost.layer_weights + cost.head_weights), rel=1e-3)


def test_common_prefix():
    assert [common_prefix(a, b) for a, b in [([], [1]), ([1, 2], [1, 2, 3]), ([1, 2, 9], [1, 2, 3]), ([5], [6])]] == [
        0,
        2,
        2,
        0,
    ]


def test_percentile():
    assert percentile([3, 1, 2], 50) == 2
    assert percentile([0, 10], 99) == pytest.approx(9.9)
    assert percentile([7], 99) == 7


def test_peers_are_found_by_model_device_and_rate():
    (vllm,) = (
        f
        for f in peers.figures("llama-3.1-8b", "decode_heavy", "NVIDIA H100 80GB HBM3", 1)
        if f["engine"] == "vLLM 0.24.0"
    )
    assert vllm["seconds"] == 7.768 and vllm["output_tok_s"] == 16872.7
    (other,) = peers.figures("llama-3.1-8b", "decode_heavy", "NVIDIA H200", 1)
    assert other["seconds"] == 7.1
    assert peers.figures("llama-3.1-8b", "decode_heavy", "NVIDIA H200", 2) == []
    assert len(peers.figures("llama-3.3-70b", "single_stream", "NVIDIA H200", 4)) == 1
    (online,) = peers.figures("llama-3.1-8b", "poisson_arrivals", "NVIDIA H100 80GB HBM3", 1, 12)
    assert online["ttft_p50_ms"] == 38.0
    for figure in peers._data()["figures"]:
        assert peers.source(figure["engine"], figure["device"], figure["devices"])

"""The least that a prefill's activations move."""

import pytest

from jaxllm.bench.workloads import MODEL_SHAPES
from jaxllm.models.registry import model_class
from jaxllm.plan.activations import Activations
from jaxllm.plan.chips import chips

MB = 1_000_000


def arrays(**changes) -> Activations:
    sizes = {"stream": 4 * MB, "projected": 6 * MB, "attended": 4 * MB, "gated": 14 * MB, "layers": 3, "shards": 1}
    return Activations(**(sizes | changes))


def test_sizes_of_a_shard():
    hf = dict(MODEL_SHAPES["llama-3.3-70b"])
    config = model_class(hf).parse_config(hf)
    found = Activations.of(config, 1000, 2, shards=16)
    heads, kv_heads = 64 // 16, 1  # 8 key-value heads, each on two shards
    assert found == Activations(
        2000 * 8192, 2000 * (heads + 2 * kv_heads) * 128, 2000 * heads * 128, 2000 * 28672 // 16, 80, 16
    )


def test_all_stay_where_there_is_room():
    """Only the embeddings' rows are read; three quarters of the memory hold arrays."""
    assert arrays().least_bytes(24 * MB) == 4 * MB
    assert arrays().least_bytes(24 * MB - 4) > 4 * MB


@pytest.mark.parametrize(
    ("room", "mlp", "attention"),
    [
        (17, 2 * 4, 0),  # the gated half fits alone: the stream makes room
        (13, 2 * 14, 0),  # it does not
        (8, 2 * 14, 2 * 4),  # of queries with keys and stream either fits alone: the smaller goes
        (5, 2 * 14, 2 * 6 + 2 * 4),  # the stream alone fits
    ],
)
def test_the_smaller_makes_room(room, mlp, attention):
    on_chip = room * MB * 4 // 3 + 4
    assert arrays().least_bytes(on_chip) == 4 * MB + (3 * attention + 2 * mlp) * MB


def test_nothing_stays_where_there_is_no_such_memory():
    """The stream is written and read twice by either half of a layer; behind the last attention there is nothing."""
    layer = 2 * (6 + 4) + 3 * 4
    mlp = 2 * 14 + 3 * 4
    assert arrays().least_bytes(0) == (4 + 3 * layer + 2 * mlp) * MB
    summed = arrays(shards=2).least_bytes(0)
    assert summed == (4 + 3 * (layer + 8) + 2 * (mlp + 8)) * MB  # each sum is written before, and read after


def test_only_tpus_whose_device_is_one_core_have_it():
    """Cores of one v5p device have a VMEM each, and read each other's results through HBM alone."""
    have = {name for name, chip in chips().items() if chip.on_chip}
    assert have == {name for name, chip in chips().items() if chip.platform == "tpu"} - {"v5p"}

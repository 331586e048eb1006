"""Which sizes of steps are compiled."""

import pytest

from jaxllm.core.memory import default_decode_rungs, default_rungs
from jaxllm.engine.executables import row_rungs


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("budget", [1, 63, 64, 300, 1024, 8192, 10_000])
def test_rungs_end_at_the_budget(budget, platform):
    rungs = default_rungs(budget, platform)
    assert rungs[-1] == budget and list(rungs) == sorted(set(rungs)) and rungs[0] >= 1


def test_rungs_of_gpus_lie_closer_where_time_goes_with_tokens():
    assert default_rungs(2048, "gpu") == (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
    assert default_rungs(2048, "tpu") == (64, 128, 256, 512, 1024, 2048)


@pytest.mark.parametrize("max_num_seqs", [1, 2, 7, 256])
def test_no_accelerator_computes_one_row_alone(max_num_seqs):
    decodes = default_decode_rungs(max_num_seqs, on_cpu=False)
    assert decodes[0] == min(2, max_num_seqs)
    rows = row_rungs(max_num_seqs, decodes)
    assert rows[0] == min(2, max_num_seqs) and rows[-1] == max_num_seqs and list(rows) == sorted(set(rows))
    assert row_rungs(max_num_seqs)[0] == 1  # on a CPU, where one row is the quickest


def test_the_sampler_takes_64_rows_where_steps_of_decodes_do():
    assert row_rungs(256, default_decode_rungs(256, on_cpu=False)) == (2, 16, 64, 128, 256)
    assert row_rungs(40, default_decode_rungs(40, on_cpu=False)) == (2, 16, 40)
    assert row_rungs(256) == (1, 8, 64, 256)

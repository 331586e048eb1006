"""Parity tells a kernel that is wrong from one that rounds."""

import pytest

from jaxllm.bench import parity

SIZES = dict(max_num_seqs=4, max_num_batched_tokens=64, token_rungs=(4, 64), page_size=16)  # those of `tiny_flags`


def test_errors_are_relative_and_over_tokens_that_both_name():
    found = parity.errors([{1: -3.0, 2: -4.1, 9: -8.0}], [{1: -3.0, 2: -4.0, 7: -9.0}])
    assert found == [pytest.approx(0.1 / 5)]
    assert parity.errors([{1: -0.1}], [{1: -0.2}]) == [pytest.approx(0.1)]  # of small logprobs the difference itself


def test_a_gap_is_from_the_best():
    assert parity.gap({1: -4.0, 2: -5.0}, 1) == 0.0
    assert parity.gap({1: -4.0, 2: -5.0}, 2) == pytest.approx(0.25)


def test_an_answer_parts_once():
    """At its first token that is not the reference's best: what follows is another text."""
    assert parity.partings([[0.0, 0.0], [0.0, 0.01, 0.3], [0.02]]) == [0.01, 0.02]
    assert parity.partings([[0.0]]) == []


def test_rounding_is_measured_and_allowed(tiny_flags):
    result = parity.measure_parity(tiny_flags[1], {"dtype": "bfloat16", "load_format": "dummy", **SIZES}, 4)
    assert 0 < result.rounding_mean <= result.rounding_worst and result.backend_mean < 3 * result.rounding_mean
    assert result.tolerance == max(parity.TOLERANCE, 2 * result.rounding_worst) and result.agrees
    assert result.worst_parting <= result.worst_gap and result.num_parted <= result.num_other <= result.num_tokens
    assert result.num_answers == 18

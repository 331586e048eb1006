"""Parity tells a kernel that is wrong from one that rounds."""

import numpy as np
import pytest

from jaxllm import SamplingParams
from jaxllm.bench import parity
from jaxllm.bench.kept_logits import kept_logits
from tests.engine import tiny

SIZES = dict(max_num_seqs=4, max_num_batched_tokens=64, token_rungs=(4, 64), page_size=16)  # those of `tiny_flags`


def test_errors_are_relative_to_all_logits():
    expected = np.array([3.0, -4.0, 0.0])
    assert parity.errors([expected + [0, 0, 0.5]], [expected]) == [pytest.approx(0.1)]
    assert parity.whole_error([expected + [0, 0, 3.0], 0 * expected], [expected, 0 * expected]) == pytest.approx(0.6)
    assert parity.largest_errors([expected + [0.2, 0, -1.0]], [expected]) == [pytest.approx(0.25)]


def test_a_gap_is_from_the_best():
    assert parity.gap(np.array([0.0, 4.0, 3.0]), 1) == 0.0
    assert parity.gap(np.array([-5.0, -4.0, -9.0]), 0) == pytest.approx(0.25)


def test_logits_are_kept_of_answers_and_of_prompts(tmp_path):
    """Those of the model in numpy, whichever step has computed them: whole prompts, chunks or decodes."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, tiny.VOCAB, length).tolist() for length in (1, 9, 60, 33)]
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=0)
    options = dict(max_num_batched_tokens=32, token_rungs=(4, 32), max_num_seqs=3)
    with tiny.llm(tiny.write_checkpoint("llama", tmp_path), **options) as llm, kept_logits(llm) as kept:
        answers = llm.generate(prompts, greedy)
    assert len(kept) == sum(len(prompt) - 1 + 6 for prompt in prompts)
    for prompt, answer in zip(prompts, answers):
        expected = tiny.reference_logits(prompt + answer.outputs[0].token_ids)
        for position in range(1, len(prompt) + 6):
            np.testing.assert_allclose(kept[tuple(prompt), position], expected[position - 1], atol=1e-4)


def test_an_answer_parts_once():
    """At its first token that is not the reference's best: what follows is another text."""
    assert parity.partings([[0.0, 0.0], [0.0, 0.01, 0.3], [0.02]]) == [0.01, 0.02]
    assert parity.partings([[0.0]]) == []


def test_rounding_is_measured_and_allowed(tiny_flags):
    result = parity.measure_parity(tiny_flags[1], {"dtype": "bfloat16", "load_format": "dummy", **SIZES}, 4)
    assert 0 < result.rounding_mean <= result.rounding_worst and result.backend_mean < 3 * result.rounding_mean
    assert result.tolerance == max(parity.TOLERANCE, 2 * result.whole_rounding) and result.agrees
    assert result.num_outside == 0
    assert result.worst_parting <= result.worst_gap and result.num_parted <= result.num_other <= result.num_tokens
    assert 0 <= result.whole_error < result.whole_rounding < result.rounding_worst
    assert result.num_answers == 18 and result.compared == "logits" and 0 <= result.worst_largest < parity.TOLERANCE


def test_single_positions_that_are_wrong_are_seen(tiny_flags, monkeypatch):
    in_order, calls = parity._in_order, []

    def spoilt(*arguments):
        found = in_order(*arguments)
        calls.append(None)
        if len(calls) == 1:  # the backend's own
            found[50], found[60] = found[50] * 1.5, found[60] * np.nan
        return found

    monkeypatch.setattr(parity, "_in_order", spoilt)
    result = parity.measure_parity(tiny_flags[1], {"dtype": "bfloat16", "load_format": "dummy", **SIZES}, 4)
    assert result.num_outside == 2 and not result.agrees

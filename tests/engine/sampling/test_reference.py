"""The device sampler against the float64 reference, token by token: the noise is the same, so the tokens must be."""

import itertools

import numpy as np
import pytest

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine.sampling import EVERYTHING, cover, variant_for
from tests.engine.sampling.harness import run
from tests.engine.sampling.reference import Row, adjusted_logits, probabilities, softmax, tokens_expected

VOCAB = 257
BATCH = 64
STOP = (3, 7, 11, 13)


def wishes(rng: np.random.Generator) -> dict[str, dict]:
    """One random setting of each parameter."""
    some = lambda count: rng.choice(VOCAB, count, replace=False).tolist()
    return {
        "temperature": {"temperature": float(rng.choice([0.0, 1e-6, 0.3, 0.7, 2.0, 50.0]))},
        "top_k": {"top_k": int(rng.choice([1, 2, 5, 40, VOCAB - 1, VOCAB, 10**12]))},
        "top_p": {"top_p": float(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]))},
        "min_p": {"min_p": float(rng.choice([1e-9, 0.01, 0.1, 0.5, 1.0]))},
        "presence": {"presence_penalty": float(rng.choice([-2, 2, rng.uniform(-2, 2)]))},
        "frequency": {"frequency_penalty": float(rng.choice([-2, 2, rng.uniform(-2, 2)]))},
        "repetition": {"repetition_penalty": float(rng.choice([0.1, 0.8, 1.2, 10]))},
        "logit_bias": {"logit_bias": {t: float(rng.choice([-100, 100, rng.normal()])) for t in some(5)}},
        "allowed": {"allowed_token_ids": sorted({*some(20), *range(5), 100})},
        "bad_words": {"bad_words": ["stands for the sequences of the row"]},
        "min_tokens": {"min_tokens": int(rng.integers(0, 16))},
        "logprobs": {"logprobs": int(rng.integers(0, 21))},
    }


def random_row(rng: np.random.Generator, **params) -> Row:
    """A row with a history full of repetitions and logits on a coarse grid, where many tokens tie."""
    length = int(rng.integers(2, 40))
    tokens = rng.choice([*range(6), 100, 200, VOCAB - 1], length).tolist()
    num_prompt = int(rng.integers(1, length + 1))
    logits = (rng.normal(size=VOCAB) * 3).astype(np.float32)
    if rng.random() < 0.3:
        logits = np.round(logits)
    bad_words: list[list[int]] = []
    if params.get("bad_words"):
        likely = np.argsort(-logits)[:10].tolist()
        tail = tokens[-3:]
        bad_words = [[likely[0]], [*tail[-1:], likely[1]], [*tail[-2:], likely[2]], [*tail, likely[3]], [1, likely[4]]]
        bad_words += [[5] * 15 + [likely[5]]]
    return Row(
        logits=logits,
        params=SamplingParams(**{"temperature": 1.0, "max_tokens": None, **params}),
        tokens=tokens,
        num_prompt_tokens=num_prompt,
        stop_token_ids=STOP,
        bad_words=bad_words,
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
    )


def check(rows: list[Row]) -> float:
    """Compares tokens; returns the share of rows where rounding leaves a single right answer."""
    sure = 0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        full = (batch * BATCH)[:BATCH]  # one compiled shape
        sampled = run(full, EVERYTHING)
        assert np.all(sampled.finite) and np.all(np.asarray(sampled.num_accepted) == 1)
        for row, token in zip(batch, np.asarray(sampled.tokens)[:, 0], strict=False):
            expected = tokens_expected(row)
            assert int(token) in expected, (row.params, expected)
            sure += len(expected) == 1
    return sure / len(rows)


@pytest.mark.parametrize("names", [(name,) for name in wishes(np.random.default_rng(0))], ids=lambda n: n[0])
def test_each_parameter(names):
    rng = np.random.default_rng(1)
    rows = [random_row(rng, **wishes(rng)[names[0]]) for _ in range(BATCH)]
    assert check(rows) > 0.9


def test_every_pair_of_parameters():
    rng = np.random.default_rng(2)
    rows = []
    for first, second in itertools.combinations(wishes(rng), 2):
        for _ in range(8):
            chosen = wishes(rng)
            rows.append(random_row(rng, **chosen[first], **chosen[second]))
    assert check(rows) > 0.9


def test_many_parameters_at_once():
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(4 * BATCH):
        chosen = {}
        for params in wishes(rng).values():
            if rng.random() < 0.6:
                chosen |= params
        rows.append(random_row(rng, **chosen))
    # allowed_token_ids and bad words may together forbid everything; such rows have no answer.
    rows = [row for row in rows if np.isfinite(adjusted_logits(row).max())]
    assert check(rows) > 0.9


def test_smaller_variants_give_the_same_tokens_as_the_reference():
    rng = np.random.default_rng(4)
    for names in [("temperature",), ("temperature", "top_k"), ("top_p",), ("top_k", "top_p", "min_p")]:
        rows = []
        for _ in range(BATCH):
            chosen = wishes(rng)
            rows.append(random_row(rng, **{k: v for name in names for k, v in chosen[name].items()}))
        sampled = run(rows, cover(variant_for(row.params for row in rows)))
        for row, token in zip(rows, np.asarray(sampled.tokens)[:, 0], strict=True):
            assert int(token) in tokens_expected(row), row.params


def test_logprobs_are_those_of_the_raw_logits():
    rng = np.random.default_rng(5)
    rows = []
    for _ in range(BATCH):
        chosen = wishes(rng)
        rows.append(random_row(rng, **chosen["temperature"], **chosen["presence"], **chosen["logit_bias"], logprobs=20))
    sampled = run(rows, EVERYTHING)
    for i, row in enumerate(rows):
        logprobs = np.log(softmax(row.logits.astype(np.float64)))
        token = int(sampled.tokens[i, 0])
        np.testing.assert_allclose(sampled.logprob[i], logprobs[token], atol=1e-5)
        assert sampled.rank[i] == 1 + np.sum(row.logits > row.logits[token])
        order = np.argsort(-row.logits, kind="stable")[:20]
        np.testing.assert_array_equal(sampled.top_ids[i], order)
        np.testing.assert_allclose(sampled.top_logprobs[i], logprobs[order], atol=1e-5)


def test_the_reference_itself_knows_simple_cases():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    for params, expected in [
        (SamplingParams(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (SamplingParams(top_p=0.8), [0.5, 0.25, 0.125, 0.125]),  # the two last tie
        (SamplingParams(top_k=1), [1, 0, 0, 0]),
        (SamplingParams(min_p=0.4), [2 / 3, 1 / 3, 0, 0]),
        (SamplingParams(temperature=0.5, top_k=2), [0.8, 0.2, 0, 0]),
        (SamplingParams(top_k=2, top_p=0.6), [1, 0, 0, 0]),  # top_p sees what top_k left: 2/3 reaches 0.6
    ]:
        np.testing.assert_allclose(probabilities(Row(logits, params)), expected, atol=1e-6)

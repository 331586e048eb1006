"""Sampled distributions against exact ones by chi-square. Seeds are fixed, so a failure is a change, not bad luck."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.core.seeds import derive_seed
from jaxllm.engine.sampling import EVERYTHING, FILTERS, RANDOM, unpack
from jaxllm.engine.sampling.noise import gumbel
from tests.engine.sampling.harness import jit_sample, upload
from tests.engine.sampling.reference import Row, probabilities

VOCAB = 50
DRAWS = 16384
P_VALUE = 1e-3


def draws(row: Row, variant, over: str = "seeds", count: int = DRAWS) -> np.ndarray:
    """int[count]: tokens of one row drawn under many seeds, or at many positions of one seed."""
    _, tables, block = upload([row], VOCAB, [0], 1)
    params = unpack(jnp.asarray(np.repeat(block, count, axis=0)))
    if over == "seeds":
        seeds = np.array([derive_seed(row.seed, i) for i in range(count)], np.uint64)
        words = np.stack([seeds >> np.uint64(32), seeds & np.uint64(2**32 - 1)], axis=1).astype(np.uint32)
        params = dataclasses.replace(params, seed=jnp.asarray(words))
    else:
        params = dataclasses.replace(params, position=jnp.arange(count, dtype=jnp.int32))
    logits = jnp.broadcast_to(jnp.asarray(row.logits), (count, VOCAB))
    sampled = jit_sample(logits, params, tables, jnp.zeros(count, jnp.int32), variant=variant)
    assert np.all(sampled.finite)
    return np.asarray(sampled.tokens)[:, 0]


def assert_distributed(tokens: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square of the tokens against probabilities; cells expecting under 5 are pooled; impossible ones empty."""
    counts = np.bincount(tokens, minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    expectation = expected * len(tokens)
    rare = expectation < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expectation = np.append(expectation[~rare], expectation[rare].sum())
    used = expectation > 0
    if used.sum() > 1:
        assert stats.chisquare(observed[used], expectation[used]).pvalue > P_VALUE


LOGITS = (np.random.default_rng(7).normal(size=VOCAB) * 1.5).astype(np.float32)
HISTORY = [0, 1, 2, 3, 4, 4, 4, 5, 5, 6, 7]
LIKELY = [int(token) for token in np.argsort(-LOGITS)]

PLAIN = [{}, {"temperature": 0.3}, {"temperature": 3.0}, {"temperature": 1e4}]
FILTERED = [
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 8, "top_p": 0.8, "temperature": 1.3},
    {"top_p": 0.9, "min_p": 0.05, "temperature": 0.8},
    {"top_k": 10, "top_p": 0.85, "min_p": 0.03, "temperature": 2.0},
]
ADJUSTED = [
    {"presence_penalty": 1.5, "frequency_penalty": -0.7, "repetition_penalty": 1.3},
    {"logit_bias": {LIKELY[0]: -2.0, LIKELY[-1]: 4.0}},
    {"allowed_token_ids": LIKELY[3:12]},
    {"bad_words": ["word"], "min_tokens": 20},
    {
        "temperature": 1.2,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
        "logit_bias": {LIKELY[2]: 1.0, 5: 2.0},
        "bad_words": ["word"],
        "min_tokens": 20,
    },
]


@pytest.mark.parametrize(
    ("variant", "params"),
    [(RANDOM, p) for p in PLAIN] + [(FILTERS, p) for p in FILTERED] + [(EVERYTHING, p) for p in PLAIN[:2] + ADJUSTED],
    ids=str,
)
def test_distribution_over_seeds(variant, params):
    row = Row(LOGITS, SamplingParams(max_tokens=None, **params), HISTORY, 4, stop_token_ids=LIKELY[5:7], seed=11)
    if "bad_words" in params:
        row.bad_words = [[LIKELY[0]], [6, 7, LIKELY[1]], [6, LIKELY[4]]]
    assert_distributed(draws(row, variant), probabilities(row))


@pytest.mark.parametrize(("variant", "params"), [(RANDOM, {}), (FILTERS, {"top_p": 0.8})], ids=str)
def test_distribution_over_positions(variant, params):
    row = Row(LOGITS, SamplingParams(**params), seed=2**63 + 5)
    assert_distributed(draws(row, variant, over="positions"), probabilities(row))


def test_ties_at_the_threshold_share_its_probability():
    logits = np.full(VOCAB, -5, np.float32)
    logits[[4, 9, 30]] = 2.0
    logits[7] = 3.0
    row = Row(logits, SamplingParams(top_k=2), seed=1)
    tokens = draws(row, FILTERS)
    assert set(tokens.tolist()) == {4, 7, 9, 30}
    assert_distributed(tokens, probabilities(row))


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_draws_of_neighbouring_seeds_and_positions_are_independent(over):
    coin = np.full(VOCAB, -np.inf, np.float32)
    coin[:4] = [0.0, 0.3, -0.2, 0.1]
    tokens = draws(Row(coin, SamplingParams(), seed=123), RANDOM, over)
    table = np.zeros((4, 4))
    np.add.at(table, (tokens[:-1], tokens[1:]), 1)
    assert stats.chi2_contingency(table).pvalue > P_VALUE


def test_noise_is_gumbel_far_into_its_upper_tail():
    rows, vocab = 64, 2**16
    seed = np.stack([np.arange(rows), np.full(rows, 9)], axis=1).astype(np.uint32)
    noise = np.asarray(jax.jit(gumbel)(jnp.asarray(seed), jnp.full(rows, 3), jnp.arange(vocab)), np.float64).ravel()
    assert np.all(np.isfinite(noise))
    # Survival at 10**-5 still counts 42 draws; the binomial test takes care of their scatter.
    for survival in (0.9, 0.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-5):
        quantile = -np.log(-np.log1p(-survival))
        count = int((noise > quantile).sum())
        assert stats.binomtest(count, noise.size, survival).pvalue > P_VALUE

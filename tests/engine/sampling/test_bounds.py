"""Every parameter at its limits, and what each alone must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine.sampling import EVERYTHING, FILTERS, GREEDY, RANDOM, SlotParams, sample, unpack
from jaxllm.engine.sampling.filters import kept_tokens
from tests.engine.sampling.harness import jit_sample, run
from tests.engine.sampling.reference import Row, kept

VOCAB = 300
RNG = np.random.default_rng(0)
LOGITS = (RNG.normal(size=VOCAB) * 3).astype(np.float32)
LIKELY = np.argsort(-LOGITS).tolist()


def tokens_of(params: SamplingParams, logits: np.ndarray = LOGITS, variant=EVERYTHING, **row):
    """The tokens under 64 seeds."""
    sampled = run([Row(logits, params, seed=seed, **row) for seed in range(64)], variant)
    assert np.all(sampled.finite)
    return np.asarray(sampled.tokens)[:, 0].tolist()


def test_greedy_is_the_first_maximum():
    logits = np.zeros(VOCAB, np.float32)
    logits[[100, 17, 250]] = 2.5
    for variant in (GREEDY, RANDOM, FILTERS, EVERYTHING):
        assert set(tokens_of(SamplingParams(temperature=0, top_k=2, top_p=0.1), logits, variant)) == {17}
    logits[:] = 0.0
    logits[0] = -0.0
    assert set(tokens_of(SamplingParams(temperature=0), logits)) == {0}


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-6])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e37])
def test_tiny_temperature_is_greedy_and_finite(temperature, scale):
    tokens = tokens_of(SamplingParams(temperature=temperature), LOGITS * np.float32(scale))
    assert set(tokens) == {LIKELY[0]}


def test_a_small_temperature_is_not_rounded_up():
    logits = np.zeros(VOCAB, np.float32)
    logits[200] = 1e-4
    assert set(tokens_of(SamplingParams(temperature=1e-6), logits)) == {200}
    assert len(set(tokens_of(SamplingParams(temperature=1e-4), logits))) > 40


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_huge_temperature_is_uniform_and_finite(temperature):
    assert len(set(tokens_of(SamplingParams(temperature=temperature)))) > 45
    assert set(tokens_of(SamplingParams(temperature=1e30, top_k=3))) == set(LIKELY[:3])


def test_disabled_filters_change_no_token():
    plain = tokens_of(SamplingParams(), variant=RANDOM)
    for params in [
        SamplingParams(top_k=0, top_p=1.0, min_p=0.0),
        SamplingParams(top_k=-1),
        SamplingParams(top_k=VOCAB),
        SamplingParams(top_k=VOCAB + 1),
        SamplingParams(top_k=2**62),
        SamplingParams(top_p=1 - 1e-12),
    ]:
        assert tokens_of(params, variant=FILTERS) == plain
        assert tokens_of(params, variant=EVERYTHING) == plain


def test_narrowest_filters_are_greedy():
    for params in [
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(top_p=1e-300),
        SamplingParams(min_p=1.0),
        SamplingParams(min_p=1.0, top_k=50, top_p=0.5, temperature=100.0),
    ]:
        assert set(tokens_of(params, variant=FILTERS)) == {LIKELY[0]}


def kept_by(logits: np.ndarray, **params) -> np.ndarray:
    p = SamplingParams(**params)
    one = lambda value, dtype: jnp.full(1, value, dtype)
    distance = jnp.asarray((logits.max() - logits)[None])
    keep = jax.jit(kept_tokens)(
        distance,
        jnp.arange(len(logits)),
        one(True, bool),
        one(p.top_k, jnp.int32),
        one(p.top_p, jnp.float32),
        one(p.min_p, jnp.float32),
    )
    return np.asarray(keep)[0]


@pytest.mark.parametrize("k", [1, 2, 3, 10, 150, VOCAB - 1])
def test_top_k_keeps_exactly_k_where_nothing_ties(k):
    np.testing.assert_array_equal(np.flatnonzero(kept_by(LOGITS, top_k=k)), np.sort(LIKELY[:k]))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 100])
def test_top_k_keeps_ties_with_the_last(k):
    logits = np.round(LOGITS)
    cut = np.sort(logits)[::-1][k - 1]
    np.testing.assert_array_equal(kept_by(logits, top_k=k), logits >= cut)
    assert kept_by(np.zeros(VOCAB, np.float32), top_k=k).all()


def test_neighbouring_floats_are_told_apart():
    logits = np.full(VOCAB, -1, np.float32)
    logits[7] = 1.0
    logits[8] = np.nextafter(np.float32(1), np.float32(0))
    logits[9] = np.nextafter(logits[8], np.float32(0))
    for k in (1, 2, 3):
        np.testing.assert_array_equal(np.flatnonzero(kept_by(logits, top_k=k)), [7, 8, 9][:k])
    logits[7:10] = [2.0, 0.5, 0.5 - 2**-23]  # distances 1.5 and the next float
    for k in (1, 2, 3):
        np.testing.assert_array_equal(np.flatnonzero(kept_by(logits, top_k=k)), [7, 8, 9][:k])
    assert kept_by(logits, top_p=1e-3).sum() == 1


def test_top_p_at_exact_sums():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))
    for p, count in [(0.5, 1), (0.51, 2), (0.75, 2), (0.7501, 3), (0.875, 3), (0.88, 5), (0.99, 5)]:
        assert kept_by(logits, top_p=p).sum() == count


def test_top_p_over_a_wide_vocabulary_of_faint_tokens():
    # Float32 sums, one token after another, would drift by percents here, and plain fixed-point rounding by 3e-5.
    faint, margin = 75_000, 1e-6
    weight = np.concatenate([[0.85], np.full(faint, 1.0004e-6), np.full(faint, 0.9997e-6)])
    logits = np.log(weight).astype(np.float32)
    weight = np.exp(logits.astype(np.float64))
    boundary = weight[: 1 + faint].sum() / weight.sum()
    assert kept_by(logits, top_p=boundary - margin).sum() == 1 + faint
    assert kept_by(logits, top_p=boundary + margin).sum() == 1 + 2 * faint


@pytest.mark.parametrize("seed", range(20))
def test_filters_keep_what_the_reference_keeps(seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=VOCAB) * rng.choice([0.1, 1, 5, 50])).astype(np.float32)
    params = dict(
        top_k=int(rng.integers(1, VOCAB)), top_p=float(rng.uniform(0.01, 1)), min_p=float(10 ** rng.uniform(-6, 0))
    )
    for names in (["top_k"], ["top_p"], ["min_p"], ["top_k", "top_p"], ["top_k", "top_p", "min_p"]):
        chosen = {name: params[name] for name in names}
        x, p = logits.astype(np.float64), SamplingParams(**chosen)
        keep = kept_by(logits, **chosen)
        assert np.all(kept(x, p, -1e-5) <= keep) and np.all(keep <= kept(x, p, 1e-5))


def test_penalties_at_their_bounds():
    flat = np.ones(VOCAB, np.float32)
    history = {"tokens": [5, 6, 7, 7, 8], "num_prompt_tokens": 2}
    greedy = lambda **params: tokens_of(SamplingParams(temperature=0, **params), flat, **history)[0]
    assert greedy(presence_penalty=-2) == 7  # the first of the tokens in the output
    assert greedy(presence_penalty=-2, frequency_penalty=1) == 8
    assert greedy(frequency_penalty=-2) == 7
    assert greedy(repetition_penalty=0.5) == 5  # the prompt counts for this one
    assert greedy(repetition_penalty=2) == 0
    steep = np.where(np.arange(VOCAB) == 7, 10, -10).astype(np.float32)
    for extreme in (1e-300, 1e-40, 1e40, 1e300):
        for allowed in ([7], [5]):
            params = SamplingParams(repetition_penalty=extreme, allowed_token_ids=allowed)
            assert set(tokens_of(params, steep, **history)) == set(allowed)
    up = np.where(np.arange(VOCAB) == 7, -1, -5).astype(np.float32)  # negative logits are multiplied
    assert tokens_of(SamplingParams(temperature=0, repetition_penalty=10), up, **history)[0] == 0


def test_logit_bias_and_allowed_token_ids():
    assert set(tokens_of(SamplingParams(logit_bias={LIKELY[-1]: 100.0}))) == {LIKELY[-1]}
    assert LIKELY[0] not in tokens_of(SamplingParams(logit_bias={LIKELY[0]: -100.0}))
    assert set(tokens_of(SamplingParams(allowed_token_ids=[LIKELY[-1]]))) == {LIKELY[-1]}
    assert set(tokens_of(SamplingParams(allowed_token_ids=[0, VOCAB - 1], temperature=50.0))) == {0, VOCAB - 1}
    both = SamplingParams(allowed_token_ids=LIKELY[10:20], logit_bias={LIKELY[0]: 100.0, LIKELY[19]: 50.0})
    assert set(tokens_of(both)) == {LIKELY[19]}


def test_min_tokens_ends_exactly_there():
    peaked = np.zeros(VOCAB, np.float32)
    peaked[[3, 4]] = [50, 40]
    for output, first in [(0, 0), (1, 0), (2, 0), (3, 3), (4, 3)]:
        params = SamplingParams(temperature=0, min_tokens=3)
        tokens = tokens_of(params, peaked, tokens=[9] * (5 + output), num_prompt_tokens=5, stop_token_ids=[3, 4])
        assert set(tokens) == {first}


def test_bad_words():
    peaked = np.zeros(VOCAB, np.float32)
    peaked[3] = 50
    words = [[5, 6, 3]]
    greedy = lambda tokens, prompt, bad=words: tokens_of(
        SamplingParams(temperature=0), peaked, tokens=tokens, num_prompt_tokens=prompt, bad_words=bad
    )[0]
    assert greedy([1, 5, 6], 1) == 0
    assert greedy([5, 6], 0) == 0
    assert greedy([1, 5, 6, 1], 1) == 3
    assert greedy([6], 0) == 3  # shorter than the prefix
    assert greedy([1, 5, 6], 2) == 3  # the prefix reaches into the prompt
    assert greedy([1], 1, [[3]]) == 0
    longest = [list(range(10, 25)) + [3]]
    assert greedy([1, *range(10, 25)], 1, longest) == 0
    assert greedy([1, *range(10, 24)], 1, longest) == 3
    assert greedy([1, 9, *range(11, 25)], 1, longest) == 3
    many = [[7, i] for i in range(100, 227)] + [[7, 3]]
    assert greedy([1, 7], 1, many) == 0


def test_a_row_that_may_choose_nothing_is_flagged():
    row = Row(LOGITS, SamplingParams(allowed_token_ids=[4, 5], min_tokens=2), [1], 1, stop_token_ids=[4, 5])
    free = Row(LOGITS, SamplingParams(), [1], 1)
    sampled = run([row, free] * 32, EVERYTHING)
    assert sampled.finite.tolist() == [False, True] * 32
    assert sampled.tokens[0, 0] == 0


def test_padding_rows_are_harmless():
    block = SlotParams(2).take([-1, -1], [0, 0])
    assert not block.any()
    tables = None
    rows, slots = unpack(jnp.asarray(block)), jnp.asarray([-1, -1])
    sampled = jit_sample(jnp.zeros((2, 8)), rows, tables, slots, variant=FILTERS)
    assert sampled.tokens.tolist() == [[0], [0]] and sampled.finite.all()


def test_no_variant_sorts_the_vocabulary():
    args = (jnp.zeros((2, VOCAB)), unpack(jnp.asarray(SlotParams(2).take([0, 1], [0, 0]))))
    text = jax.jit(sample, static_argnames="variant").lower(*args, None, jnp.arange(2), variant=FILTERS).as_text()
    assert "sort" not in text and "top_k" not in text

"""A row's token is its own: neither neighbours, padding, variants, shards nor stale tables reach it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine.sampling import EVERYTHING, FILTERS, GREEDY, RANDOM, VARIANTS, SamplerVariant, SlotTables, unpack
from tests.engine.sampling.harness import jit_sample, run, upload
from tests.engine.sampling.reference import Row, tokens_expected
from tests.engine.sampling.test_reference import random_row, wishes

VOCAB = 4099  # a prime: vectorized loops have a remainder
LOGPROBS_ONLY = SamplerVariant(num_logprobs=5)


def rows_using(names: tuple[str, ...], count: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        chosen = wishes(rng)
        row = random_row(rng, **{k: v for name in names for k, v in chosen[name].items()})
        row.logits = (rng.normal(size=VOCAB) * 3).astype(np.float32)
        rows.append(row)
    return rows


UNMASKED = [variant for variant in VARIANTS if not variant.masked]  # `sample` knows nothing of masks
FAMILIES = {
    GREEDY: (),
    RANDOM: ("temperature",),
    FILTERS: ("temperature", "top_k", "top_p", "min_p"),
    EVERYTHING: tuple(wishes(np.random.default_rng(0))),
}


@pytest.mark.parametrize("least", UNMASKED, ids=range(4))
def test_alone_in_a_batch_padded_and_in_any_variant(least):
    rows = rows_using(FAMILIES[least], 32, seed=10)
    if least is GREEDY:
        for row in rows:
            row.params = SamplingParams(temperature=0)
    if least is EVERYTHING:
        for row in rows:
            row.params = dataclasses.replace(row.params, allowed_token_ids=None)
    tokens = np.asarray(run(rows, least).tokens)[:, 0]
    assert len(set(tokens.tolist())) > 5
    alone = [int(run([row], least).tokens[0, 0]) for row in rows[:8]]
    np.testing.assert_array_equal(tokens[:8], alone)
    order = np.random.default_rng(0).permutation(32)
    slots = np.random.default_rng(1).permutation(40)[:32].tolist()
    moved = run([rows[i] for i in order], least, width=4224, slots=slots, num_slots=40)
    np.testing.assert_array_equal(tokens[order], np.asarray(moved.tokens)[:, 0])
    for variant in [*UNMASKED, LOGPROBS_ONLY]:
        if variant.serves(dataclasses.replace(least, num_logprobs=None)):
            np.testing.assert_array_equal(tokens, np.asarray(run(rows, variant).tokens)[:, 0])


def test_logprobs_do_not_depend_on_padding():
    rows = rows_using(FAMILIES[RANDOM], 32, seed=11)
    plain, padded = run(rows, EVERYTHING), run(rows, EVERYTHING, width=4224, num_slots=40)
    np.testing.assert_allclose(plain.logprob, padded.logprob, atol=1e-6)
    np.testing.assert_array_equal(plain.rank, padded.rank)
    np.testing.assert_array_equal(plain.top_ids, padded.top_ids)
    np.testing.assert_allclose(plain.top_logprobs, padded.top_logprobs, atol=1e-6)


@pytest.mark.parametrize("variant", UNMASKED, ids=range(4))
def test_non_finite_rows_are_flagged_and_touch_no_other(variant):
    rows = rows_using(FAMILIES[variant], 32, seed=12)
    for row in rows:
        row.params = dataclasses.replace(row.params, allowed_token_ids=None)
    clean = run(rows, variant)
    bad = {1: np.nan, 4: -np.nan, 9: np.inf, 20: np.nan, 31: np.inf}
    for place, (index, value) in enumerate(bad.items()):
        rows[index].logits = rows[index].logits.copy()
        rows[index].logits[[0, VOCAB - 1, 17, 2048, 4000][place]] = value
    rows[13].logits = np.full(VOCAB, -np.inf, np.float32)
    rows[14].logits = np.full(VOCAB, np.nan, np.float32)
    poisoned = run(rows, variant)
    for index in range(32):
        if index in bad or index in (13, 14):
            assert not poisoned.finite[index] and poisoned.tokens[index, 0] == 0
        else:
            assert poisoned.finite[index] and poisoned.tokens[index, 0] == clean.tokens[index, 0]
            assert poisoned.logprob[index] == clean.logprob[index] and poisoned.rank[index] == clean.rank[index]


@pytest.mark.parametrize("masked", [{"allowed_token_ids": [1, 2]}, {"min_tokens": 3}], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_logits_are_flagged_even_under_a_mask(masked, value):
    logits = np.zeros(VOCAB, np.float32)
    logits[5] = value
    row = Row(logits, SamplingParams(**masked), [0], 1, stop_token_ids=[5])
    assert not run([row], EVERYTHING).finite[0]


def test_minus_infinity_is_a_token_never_chosen():
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[4000] = -3
    for variant in UNMASKED:
        sampled = run([Row(logits, SamplingParams(temperature=float(variant.random), top_k=3, top_p=0.5))], variant)
        assert sampled.finite[0] and sampled.tokens[0, 0] == 4000


@pytest.mark.parametrize("variant", UNMASKED, ids=range(4))
def test_stale_tables_reach_nobody(variant):
    # `upload` fills what nobody asked for with NaN, True, impossible tokens and bad words that match always.
    quiet = rows_using(FAMILIES[FILTERS if variant is EVERYTHING else variant], 16, seed=13)
    noisy = rows_using(("presence", "bad_words", "logit_bias", "min_tokens"), 16, seed=14)
    rows = quiet + (noisy if variant is EVERYTHING else quiet)
    for row in rows:
        row.logits[:128] += 20  # where the stale bad words would hurt
    _, stale, block = upload(rows, VOCAB, list(range(32)), 32)
    clean = SlotTables(
        history=stale.history.at[:16].set(0),
        bias=stale.bias.at[:16].set(0),
        stop_mask=stale.stop_mask.at[:16].set(False),
        bad_words=stale.bad_words.at[:16].set(-1),
    )
    logits, slots = jnp.asarray(np.stack([row.logits for row in rows])), jnp.arange(32)
    results = [jit_sample(logits, unpack(jnp.asarray(block)), t, slots, variant=variant) for t in (stale, clean)]
    for one, other in zip(*(dataclasses.asdict(r).values() for r in results), strict=True):
        np.testing.assert_array_equal(one, other)
    if variant.random:
        for row, token in zip(quiet, results[0].tokens[:16, 0], strict=True):
            assert int(token) in tokens_expected(row)


def test_rows_that_ask_read_their_own_slot_only():
    rows = rows_using(("bad_words", "logit_bias", "min_tokens", "repetition"), 32, seed=14)
    slots = np.random.default_rng(2).permutation(40)[:32].tolist()
    spread = run(rows, EVERYTHING, width=4224, slots=slots, num_slots=40)
    np.testing.assert_array_equal(run(rows, EVERYTHING).tokens, spread.tokens)


def test_variants_without_adjust_need_no_tables():
    rows = rows_using(("temperature",), 4, seed=15)
    _, _, block = upload(rows, VOCAB, range(4), 4)
    logits = jnp.asarray(np.stack([row.logits for row in rows]))
    bare = jit_sample(logits, unpack(jnp.asarray(block)), None, jnp.arange(4), variant=RANDOM)
    np.testing.assert_array_equal(bare.tokens, run(rows, RANDOM).tokens)


def test_a_shard_of_the_vocabulary_draws_what_the_whole_would():
    rows = rows_using(("temperature", "top_k", "presence", "repetition", "bad_words", "logit_bias"), 16, seed=16)
    start = 2000
    _, tables, block = upload(rows, VOCAB, range(16), 16)
    params, slots = unpack(jnp.asarray(block)), jnp.arange(16)
    logits = jnp.asarray(np.stack([row.logits for row in rows]))
    masked = jit_sample(
        jnp.where(jnp.arange(VOCAB) < start, -jnp.inf, logits), params, tables, slots, variant=EVERYTHING
    )
    shard_tables = dataclasses.replace(tables, bias=tables.bias[:, start:], stop_mask=tables.stop_mask[:, start:])
    shard = jit_sample(
        logits[:, start:], params, shard_tables, slots, variant=EVERYTHING, vocab_size=VOCAB, vocab_offset=start
    )
    np.testing.assert_array_equal(masked.tokens, shard.tokens)
    np.testing.assert_array_equal(masked.top_ids, shard.top_ids)
    np.testing.assert_allclose(masked.logprob, shard.logprob, atol=1e-6)

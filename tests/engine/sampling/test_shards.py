"""A vocabulary in shards gives what the whole one gives: tokens, logprobs, ranks, flags. The shards are a mapped axis
of one device here; the engine's tests have devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.engine.sampling import Sampled, SlotTables, logprobs_of, sample, unpack
from tests.engine.sampling.harness import run, upload
from tests.engine.sampling.reference import Row
from tests.engine.sampling.test_independence import FAMILIES, UNMASKED, VOCAB, rows_using

AXIS = "shards"


@functools.partial(jax.jit, static_argnames=("variant", "shards"))
def _in_shards(logits, block, history, bias, stop_mask, bad_words, variant, shards) -> Sampled:
    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], shards, -1).swapaxes(0, 1)

    def one(logits, bias, stop_mask):
        width, slots = logits.shape[1], jnp.arange(logits.shape[0])
        tables = SlotTables(history, bias, stop_mask, bad_words)
        start = jax.lax.axis_index(AXIS) * width
        return sample(logits, unpack(block), tables, slots, variant, VOCAB, start, AXIS)

    return jax.vmap(one, axis_name=AXIS)(cut(logits), cut(bias), cut(stop_mask))


def in_shards(rows: list[Row], variant, shards: int) -> list[Sampled]:
    """What each shard says; the padding is NaN."""
    width = -(-VOCAB // shards) * shards
    _, tables, block = upload(rows, width, range(len(rows)), len(rows))
    logits = np.full((len(rows), width), np.nan, np.float32)
    logits[:, :VOCAB] = [row.logits for row in rows]
    found = _in_shards(
        logits, block, tables.history, tables.bias, tables.stop_mask, tables.bad_words, variant=variant, shards=shards
    )
    parts: list[Sampled] = []
    for shard in range(shards):
        parts.append(jax.tree.map(lambda x, at=shard: np.asarray(x[at]), found))
    return parts


def assert_same(found: Sampled, whole: Sampled) -> None:
    for name in ("tokens", "num_accepted", "rank", "top_ids", "finite"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name), err_msg=name)
    finite = np.asarray(whole.finite)
    for name in ("logprob", "top_logprobs"):
        np.testing.assert_allclose(getattr(found, name)[finite], getattr(whole, name)[finite], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("variant", UNMASKED, ids=range(4))
@pytest.mark.parametrize("shards", [2, 3, 8])
def test_tokens_and_logprobs(variant, shards):
    rows = rows_using(FAMILIES[variant], 32, seed=shards)
    whole = run(rows, variant)
    assert len(set(np.asarray(whole.tokens)[:, 0].tolist())) > 5
    for found in in_shards(rows, variant, shards):
        assert_same(found, whole)


@pytest.mark.parametrize("variant", UNMASKED, ids=range(4))
def test_ties_across_shards_fall_to_the_lower_id(variant):
    rows = rows_using((), 4, seed=0)
    for row in rows:
        row.params.temperature = 0
        row.logits = np.zeros(VOCAB, np.float32)
    rows[1].logits[[3000, 4098]] = 5
    rows[2].logits[4098] = 5
    rows[3].logits[[10, 2999, 3001]] = 5
    for found in in_shards(rows, variant, 4):
        assert found.tokens[:, 0].tolist() == [0, 3000, 4098, 10]
        if variant.num_logprobs is not None:
            assert found.top_ids[3, :5].tolist() == [10, 2999, 3001, 0, 1]
            assert found.rank.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("variant", UNMASKED, ids=range(4))
def test_what_is_not_finite_in_one_shard_is_seen_by_all(variant):
    rows = rows_using(FAMILIES[variant], 8, seed=3)
    for row, (place, value) in zip(rows, [(0, np.nan), (4098, np.nan), (17, np.inf), (4000, np.inf)], strict=False):
        row.logits[place] = value
    rows[4].logits[:] = -np.inf
    whole = run(rows, variant)
    assert not np.asarray(whole.finite)[:5].any() and np.asarray(whole.finite)[5:].all()
    for found in in_shards(rows, variant, 4):
        np.testing.assert_array_equal(found.finite, whole.finite)
        np.testing.assert_array_equal(found.tokens, whole.tokens)


@pytest.mark.parametrize("k", [0, 1, 20, VOCAB])
def test_wide_logprobs(k):
    rng = np.random.default_rng(k)
    logits = np.round(rng.normal(size=(6, VOCAB)) * 3, 1).astype(np.float32)  # with ties
    targets = np.asarray([0, 1, 2047, 2048, 4000, VOCAB - 1], np.int32)
    whole = logprobs_of(jnp.asarray(logits), jnp.asarray(targets), k)
    shards, width = 5, -(-VOCAB // 5)
    padded = np.pad(logits, ((0, 0), (0, shards * width - VOCAB)), constant_values=9.0)

    def one(part):
        return logprobs_of(part, jnp.asarray(targets), k, VOCAB, jax.lax.axis_index(AXIS) * width, AXIS)

    found = jax.jit(jax.vmap(one, axis_name=AXIS))(padded.reshape(6, shards, width).swapaxes(0, 1))
    for values, expected in zip(found, whole, strict=True):
        for shard in range(shards):
            np.testing.assert_allclose(values[shard], expected, atol=1e-5)

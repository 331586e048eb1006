import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.engine.sampling import logprobs_of

jit_logprobs = jax.jit(logprobs_of, static_argnames=("k", "vocab_size"))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("k", [0, 1, 20, 777])
def test_against_float64(k):
    rng = np.random.default_rng(k)
    logits = (rng.normal(size=(16, 777)) * 5).astype(np.float32)
    logits[3] = np.round(logits[3]) + 0.0  # ties, but of one sign of zero: top_k tells them apart
    logits[5] *= 1000
    logits[7, 100:] = -np.inf
    targets = rng.integers(0, 777, 16).astype(np.int32)
    targets[7] = 700
    expected = log_softmax(logits)
    logprob, rank, ids, top = jit_logprobs(jnp.asarray(logits), jnp.asarray(targets), k)
    rows = np.arange(16)
    np.testing.assert_allclose(logprob, expected[rows, targets], atol=2e-5, rtol=1e-6)
    np.testing.assert_array_equal(rank, 1 + (logits > logits[rows, targets][:, None]).sum(axis=1))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(top, np.take_along_axis(expected, order, axis=1), atol=2e-5, rtol=1e-6)
    assert ids.dtype == jnp.int32 and top.dtype == jnp.float32 and rank.dtype == jnp.int32


def test_padding_takes_no_probability_and_a_bad_row_stays_alone():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 100)).astype(np.float32)
    padded = np.full((4, 128), np.nan, np.float32)
    padded[:, :100] = logits
    targets = jnp.arange(4)
    plain = jit_logprobs(jnp.asarray(logits), targets, 5)
    padded[2, 50] = np.nan
    for one, other in zip(plain, jit_logprobs(jnp.asarray(padded), targets, 5, vocab_size=100), strict=True):
        np.testing.assert_allclose(np.delete(one, 2, 0), np.delete(other, 2, 0), atol=1e-6)


def test_probabilities_of_the_whole_vocabulary_sum_to_one():
    logits = np.random.default_rng(1).normal(size=(2, 5000)).astype(np.float32) * 10
    _, _, ids, top = jit_logprobs(jnp.asarray(logits), jnp.zeros(2, jnp.int32), 5000)
    np.testing.assert_allclose(np.exp(np.asarray(top, np.float64)).sum(axis=1), 1, atol=1e-5)
    assert all(len(set(row)) == 5000 for row in ids.tolist())

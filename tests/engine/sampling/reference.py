"""A plain float64 sampler, one row at a time, written from the definitions and sharing no code with the device's."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from jaxllm.core.sampling_params import SamplingParams


@dataclasses.dataclass
class Row:
    """One row of a batch: what the engine knows about the request when it samples the token at `len(tokens)`."""

    logits: np.ndarray
    params: SamplingParams
    tokens: Sequence[int] = ()
    num_prompt_tokens: int = 0
    stop_token_ids: Collection[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    seed: int = 0


def adjusted_logits(row: Row) -> np.ndarray:
    """float64[V]: logits after masks, bias and penalties."""
    p, x = row.params, row.logits.astype(np.float64).copy()
    prompt, output = list(row.tokens[: row.num_prompt_tokens]), list(row.tokens[row.num_prompt_tokens :])
    if p.allowed_token_ids is not None:
        for token in range(len(x)):
            if token not in p.allowed_token_ids:
                x[token] = -np.inf
    for word in row.bad_words:
        prefix = list(word[:-1])
        if not prefix or (len(output) >= len(prefix) and output[-len(prefix) :] == prefix):
            x[word[-1]] = -np.inf
    if len(output) < p.min_tokens:
        for token in row.stop_token_ids:
            x[token] = -np.inf
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    counts = Counter(output)
    for token in set(prompt) | set(output):
        if x[token] > 0:
            x[token] /= p.repetition_penalty
        else:
            x[token] *= p.repetition_penalty
        x[token] -= p.frequency_penalty * counts[token]
        x[token] -= p.presence_penalty * (counts[token] > 0)
    return x


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - np.max(x))
    return e / e.sum()


def kept(x: np.ndarray, p: SamplingParams, slack: float = 0.0) -> np.ndarray:
    """bool[V]: what the filters leave of tempered logits x. `slack` moves the real-valued thresholds."""
    keep = x > -np.inf
    if p.min_p > 0:
        probability = softmax(x)
        keep &= probability >= p.min_p * (1 - slack) * probability.max()
        if p.min_p == 1:
            keep = x == x.max()
    if 0 < p.top_k < len(x):
        descending = np.sort(np.where(keep, x, -np.inf))[::-1]
        keep &= x >= descending[p.top_k - 1]
    if p.top_p < 1:
        probability = softmax(np.where(keep, x, -np.inf))
        # A token stays if the tokens strictly more likely than it do not reach top_p.
        order = np.argsort(-probability, kind="stable")
        before = np.concatenate([[0.0], np.cumsum(probability[order])[:-1]])
        cut = probability[order][before < max(p.top_p + slack, 1e-300)].min()
        keep &= probability >= cut
    return keep


def probabilities(row: Row, slack: float = 0.0) -> np.ndarray:
    """float64[V]: the exact distribution of the row's token; greedy rows put it all on the first maximum."""
    x, p = adjusted_logits(row), row.params
    if p.temperature == 0:
        return (np.arange(len(x)) == np.argmax(x)).astype(np.float64)
    x = (x - x.max()) / p.temperature
    return softmax(np.where(kept(x, p, slack), x, -np.inf))


def gumbel(seed: int, position: int, vocab: int) -> np.ndarray:
    """float64[V]: the noise, from jax's own threefry."""
    high, low = np.uint32((seed >> 32) & 0xFFFFFFFF), np.uint32(seed & 0xFFFFFFFF)
    full = lambda word: jnp.full(vocab, word, jnp.uint32)
    bits = threefry2x32_p.bind(full(high), full(low), full(position), jnp.arange(vocab, dtype=jnp.uint32))[0]
    return -np.log(-np.log1p(-(np.asarray(bits, np.float64) + 0.5) * 2.0**-32))


def tokens_expected(row: Row) -> set[int]:
    """The tokens that a correct float32 sampler may give: one, but for scores or masses that rounding can swap."""
    noise = gumbel(row.seed, len(row.tokens), len(row.logits))
    expected: set[int] = set()
    for slack in (-1e-5, 0.0, 1e-5):
        with np.errstate(divide="ignore"):
            score = np.log(probabilities(row, slack))
        if row.params.temperature > 0:
            score = score + noise
            expected |= set(np.flatnonzero(score >= score.max() - 2e-4).tolist())
        else:
            expected.add(int(np.argmax(score)))
    return expected

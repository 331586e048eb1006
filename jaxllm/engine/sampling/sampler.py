"""One token a row from logits, on the device. Pure functions, to be compiled once a variant and row count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.engine.sampling.adjust import adjust
from jaxllm.engine.sampling.filters import kept_tokens
from jaxllm.engine.sampling.logprobs import logprobs_of, mask_padding
from jaxllm.engine.sampling.noise import Purpose, gumbel
from jaxllm.engine.sampling.rows import RowParams, SlotTables
from jaxllm.engine.sampling.variants import SamplerVariant
from sharding import gather_over, max_over, num_shards


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """A step's output for R rows. K tokens a row: 1 until drafts come.

    Attributes:
      tokens: int32[R, K].
      num_accepted: int32[R], how many of `tokens` count.
      logprob: float32[R], of the token under the raw logits. 0 in variants without logprobs, as is the rank.
      rank: int32[R], 1 + the number of tokens that are more likely.
      top_ids: int32[R, N], the N = variant.num_logprobs most likely tokens, most likely first. N = 0 without logprobs.
      top_logprobs: float32[R, N].
      finite: bool[R]. False where the raw logits hold NaN or +inf, or where no token is left to choose; such a row's
        token is 0 and means nothing.
    """

    tokens: jax.Array
    num_accepted: jax.Array
    logprob: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array
    finite: jax.Array


def largest_logit(logits: jax.Array) -> jax.Array:
    """float32[R]: the largest of each row of float32[R, V]; infinity if any is NaN or infinity.

    A plain maximum will not do: XLA:CPU's vectorized one loses NaNs.
    """
    return jnp.max(jnp.where(logits < jnp.inf, logits, jnp.inf), axis=1)


def first_argmax(values: jax.Array, largest: jax.Array) -> jax.Array:
    """The lowest column that holds its row's largest value; V where none does.

    Two reductions that XLA:CPU vectorizes: 4 to 6 times faster there than argmax, whose reduction of pairs is scalar.

    Args:
      values: float32[R, V].
      largest: float32[R], jnp.max(values, axis=1).

    Returns:
      int32[R].
    """
    columns = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return jnp.min(jnp.where(values == largest[:, None], columns, values.shape[1]), axis=1)


def first_best(
    values: jax.Array, largest: jax.Array, vocab_offset: jax.Array | int, axis: str | None
) -> tuple[jax.Array, jax.Array]:
    """The lowest global id that holds its row's largest value, and that value.

    Args:
      values: float32[R, V], a shard's columns.
      largest: float32[R], the shard's own largest value.
      vocab_offset: the global id of the first column.
      axis: the mesh axis of a vocabulary in shards; they exchange one (value, id) a row.

    Returns:
      int32[R] (beyond the vocabulary where no column holds it) and float32[R].
    """
    return _best_of_shards(first_argmax(values, largest) + vocab_offset, largest, axis)


def _best_of_shards(ids: jax.Array, largest: jax.Array, axis: str | None) -> tuple[jax.Array, jax.Array]:
    """Of each shard's largest values, float32[R], and the lowest ids that hold them: those of all shards."""
    if axis is None:
        return ids, largest
    both = gather_over(jnp.stack([lax.bitcast_convert_type(largest, jnp.int32), ids]), axis)  # [shards, 2, R]
    candidates = lax.bitcast_convert_type(both[:, 0], jnp.float32)
    best = jnp.max(candidates, axis=0)
    return jnp.min(jnp.where(candidates == best, both[:, 1], np.iinfo(np.int32).max), axis=0), best


def _random_scores(
    logits: jax.Array,
    largest: jax.Array,
    rows: RowParams,
    variant: SamplerVariant,
    vocab_offset: jax.Array | int,
    axis: str | None,
) -> jax.Array:
    """float32[R, V] whose largest entry is a row's token (Gumbel-max); for greedy rows, the likeliest token."""
    greedy = rows.temperature <= 0
    # Distances from the largest logit cannot overflow to NaN under a tiny temperature, as the logits themselves could.
    distance = (largest[:, None] - logits) / jnp.where(greedy, 1, rows.temperature)[:, None]
    ids = vocab_offset + jnp.arange(logits.shape[1], dtype=jnp.int32)
    noise = gumbel(rows.seed, rows.position, ids, Purpose.SAMPLE)
    scores = jnp.where(greedy[:, None], 0, noise) - distance
    if not variant.filters:
        return scores
    # A row without finite logits must not keep the others' bisection busy.
    active = ~greedy & jnp.isfinite(largest)
    kept = kept_tokens(distance, ids, active, rows.top_k, rows.top_p, rows.min_p, axis)
    return jnp.where(kept, scores, -jnp.inf)


def sample(
    logits: jax.Array,
    rows: RowParams,
    tables: SlotTables | None,
    slots: jax.Array,
    variant: SamplerVariant,
    vocab_size: int | None = None,
    vocab_offset: jax.Array | int = 0,
    axis: str | None = None,
) -> Sampled:
    """Samples one token a row.

    In vLLM's order: logprobs of the raw logits; logit_bias, allowed_token_ids, bad_words, min_tokens and penalties;
    temperature; min_p; top_k; top_p; the draw. A row's result depends on its own logits, parameters and slot only:
    not on the other rows, their number, the padding of the vocabulary, nor the variant (among those that serve it).
    The logits themselves are another matter: products of other sizes, and `sample_likeliest`'s on TPU, round otherwise.

    Args:
      logits: float32[R, V], raw.
      rows: the rows' parameters.
      tables: the slots' tables; read only by variants with `adjust`, and may be None for others.
      slots: int32[R], the slot of each row.
      variant: static.
      vocab_size: static, the real width where V is padded; None means V. Padding is never chosen, has no probability.
      vocab_offset: the global id of the first column, for a vocabulary in shards.
      axis: static, the mesh axis of a vocabulary in shards, inside `shard_map`: each shard calls this with its columns
        (V of each) of logits and tables, and all get the same tokens. None: these columns are all there are.

    Returns:
      A `Sampled`; its tokens are global ids.
    """
    width = logits.shape[1]
    size = width if vocab_size is None else vocab_size
    raw = mask_padding(logits.astype(jnp.float32), size, vocab_offset, axis)
    largest = largest_logit(raw)
    finite = jnp.bool_(True)
    adjusted = raw
    if variant.adjust:
        assert tables is not None, "a variant with adjust reads the slots' tables"
        finite = jnp.isfinite(max_over(largest, axis))
        adjusted = adjust(raw, rows, tables, slots, vocab_offset)
        largest = largest_logit(adjusted)

    if variant.random:
        largest = max_over(largest, axis)
        scores = _random_scores(adjusted, largest, rows, variant, vocab_offset, axis)
        tokens, _ = first_best(scores, jnp.max(scores, axis=1), vocab_offset, axis)
    else:
        tokens, largest = first_best(adjusted, largest, vocab_offset, axis)
    chosen = _chosen(tokens, finite & jnp.isfinite(largest))
    if variant.num_logprobs is None:
        return chosen
    num_logprobs = min(variant.num_logprobs, width * num_shards(axis))
    logprob, rank, top_ids, top_logprobs = logprobs_of(
        raw, chosen.tokens[:, 0], num_logprobs, vocab_offset=vocab_offset, axis=axis
    )
    return dataclasses.replace(chosen, logprob=logprob, rank=rank, top_ids=top_ids, top_logprobs=top_logprobs)


def sample_likeliest(largest: jax.Array, ids: jax.Array, axis: str | None = None) -> Sampled:
    """What `sample` returns in the greedy variant.

    Args:
      largest: float32[R], the largest logit of each row; infinity where any is NaN or infinity.
      ids: int32[R], the lowest global id that has it.
      axis: the mesh axis of a vocabulary in shards, of which each brings its own.
    """
    tokens, largest = _best_of_shards(ids, largest, axis)
    return _chosen(tokens, jnp.isfinite(largest))


def _chosen(tokens: jax.Array, finite: jax.Array) -> Sampled:
    """Without logprobs."""
    num_rows = len(tokens)
    return Sampled(
        tokens=jnp.where(finite, tokens, 0)[:, None],
        num_accepted=jnp.ones(num_rows, np.int32),
        logprob=jnp.zeros(num_rows, np.float32),
        rank=jnp.zeros(num_rows, np.int32),
        top_ids=jnp.zeros((num_rows, 0), np.int32),
        top_logprobs=jnp.zeros((num_rows, 0), np.float32),
        finite=finite,
    )

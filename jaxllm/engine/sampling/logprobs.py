"""Log-probabilities of the raw logits: of given tokens and of the most likely ones."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding import gather_over, max_over, num_shards, sum_over


def mask_padding(
    logits: jax.Array, vocab_size: int, vocab_offset: jax.Array | int = 0, axis: str | None = None
) -> jax.Array:
    """-inf in the columns whose global id lies beyond the vocabulary. logits: float32[R, V], a shard's along `axis`."""
    if isinstance(vocab_offset, int) and vocab_offset + logits.shape[1] <= vocab_size:
        return logits
    if axis is not None and num_shards(axis) * logits.shape[1] <= vocab_size:
        return logits
    ids = vocab_offset + lax.broadcasted_iota(jnp.int32, (1, logits.shape[1]), 1)
    return jnp.where(ids < vocab_size, logits, -jnp.inf)


def logprobs_of(
    logits: jax.Array,
    targets: jax.Array,
    k: int,
    vocab_size: int | None = None,
    vocab_offset: jax.Array | int = 0,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log-softmax of raw logits at the targets and at the k most likely tokens (vLLM's raw_logprobs).

    For prompts and for whole vocabularies it is meant to be run over chunks of rows: all of them at once would not fit.

    Args:
      logits: float32[C, V].
      targets: int32[C], token ids.
      k: static, how many of the most likely tokens; at most V (of all shards), 0 for none.
      vocab_size: static, the real width where V is padded; None means V.
      vocab_offset: the global id of the first column.
      axis: static, the mesh axis of a vocabulary in shards. Each adds its part of the sums and its k likeliest tokens;
        the logits are not gathered.

    Returns:
      The targets' logprobs float32[C]; their ranks int32[C], 1 + how many tokens are more likely; the k most likely
      ids int32[C, k], most likely first and the lower id first where they tie; their logprobs float32[C, k].
    """
    width = logits.shape[1]
    if vocab_size is not None:
        logits = mask_padding(logits, vocab_size, vocab_offset, axis)
    largest = max_over(jnp.max(logits, axis=1, keepdims=True), axis)
    log_sum = largest + jnp.log(sum_over(jnp.sum(jnp.exp(logits - largest), axis=1, keepdims=True), axis))
    columns = (targets - vocab_offset)[:, None]
    if axis is None:
        at_target = jnp.take_along_axis(logits, columns, axis=1)
    else:
        mine = (columns >= 0) & (columns < width)
        part = jnp.take_along_axis(logits, jnp.where(mine, columns, 0), axis=1)
        at_target = sum_over(jnp.where(mine, part, 0), axis)
    rank = 1 + sum_over(jnp.sum((logits > at_target).astype(jnp.int32), axis=1), axis)
    if k:
        top, top_ids = lax.top_k(logits, min(k, width))
        top_ids += vocab_offset
        if axis is not None:
            top, top_ids = _merge_top(top, top_ids, k, axis)
    else:
        top, top_ids = jnp.zeros((logits.shape[0], 0), np.float32), jnp.zeros((logits.shape[0], 0), np.int32)
    return (at_target - log_sum)[:, 0], rank, top_ids, top - log_sum


def _merge_top(values: jax.Array, ids: jax.Array, k: int, axis: str) -> tuple[jax.Array, jax.Array]:
    """The k largest of all shards' lists. Lower shards have lower ids and come first, so ties fall to the lower id.

    values: float32[C, n], ids: int32[C, n]; they travel as one array.
    """
    both = gather_over(jnp.stack([lax.bitcast_convert_type(values, jnp.int32), ids]), axis)  # [shards, 2, C, n]
    joined = both.transpose(1, 2, 0, 3).reshape(2, values.shape[0], -1)
    top, places = lax.top_k(lax.bitcast_convert_type(joined[0], jnp.float32), k)
    return top, jnp.take_along_axis(joined[1], places, axis=1)

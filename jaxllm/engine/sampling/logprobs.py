"""Log-probabilities of the raw logits: of given tokens and of the most likely ones."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def mask_padding(logits: jax.Array, vocab_size: int, vocab_offset: jax.Array | int = 0) -> jax.Array:
    """-inf in the columns whose global id lies beyond the vocabulary. logits: float32[R, V]."""
    if isinstance(vocab_offset, int) and vocab_offset + logits.shape[1] <= vocab_size:
        return logits
    ids = vocab_offset + lax.broadcasted_iota(jnp.int32, (1, logits.shape[1]), 1)
    return jnp.where(ids < vocab_size, logits, -jnp.inf)


def logprobs_of(
    logits: jax.Array, targets: jax.Array, k: int, vocab_size: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log-softmax of raw logits at the targets and at the k most likely tokens (vLLM's raw_logprobs).

    For prompts and for whole vocabularies it is meant to be run over chunks of rows: all of them at once would not fit.

    Args:
      logits: float32[C, V].
      targets: int32[C], token ids.
      k: static, how many of the most likely tokens; at most V, 0 for none.
      vocab_size: static, the real width where V is padded; None means V.

    Returns:
      The targets' logprobs float32[C]; their ranks int32[C], 1 + how many tokens are more likely; the k most likely
      ids int32[C, k], most likely first and the lower id first where they tie; their logprobs float32[C, k].
    """
    logits = mask_padding(logits, logits.shape[1] if vocab_size is None else vocab_size)
    largest = jnp.max(logits, axis=1, keepdims=True)
    log_sum = largest + jnp.log(jnp.sum(jnp.exp(logits - largest), axis=1, keepdims=True))
    at_target = jnp.take_along_axis(logits, targets[:, None], axis=1)
    rank = 1 + jnp.sum((logits > at_target).astype(jnp.int32), axis=1)
    if k:
        top, top_ids = lax.top_k(logits, k)
    else:
        top, top_ids = jnp.zeros((logits.shape[0], 0), np.float32), jnp.zeros((logits.shape[0], 0), np.int32)
    return (at_target - log_sum)[:, 0], rank, top_ids, top - log_sum

"""The mask of structured outputs: one bit a token, packed in words, filled on the host."""

import jax
import jax.numpy as jnp

from jaxllm.engine.sampling.rows import RowParams, Uses

WORD = 32  # bits


def mask_words(vocab_size: int) -> int:
    """Words of a row's mask."""
    return -(-vocab_size // WORD)


def apply_grammar_mask(
    logits: jax.Array, rows: RowParams, masks: jax.Array, slots: jax.Array, vocab_offset: jax.Array | int = 0
) -> jax.Array:
    """-inf for the tokens that a row's grammar forbids. Rows without a grammar stay as they are.

    NaN and +inf stay too, so that they are still found.

    Args:
      logits: float32[R, V].
      rows: parameters, R of each.
      masks: int32[slots, ceil(V / 32)]: bit i % 32 of word i // 32 is set where token i is allowed.
      slots: int32[R], the slot of each row.
      vocab_offset: the global id of the first column.
    """
    ids = vocab_offset + jnp.arange(logits.shape[1], dtype=jnp.int32)
    words = masks[slots].at[:, ids // WORD].get(mode="fill", fill_value=0)
    allowed = (words >> (ids % WORD)) & 1 != 0
    free = ~rows.uses(Uses.GRAMMAR)[:, None]
    return jnp.where(free | allowed | ~(logits < jnp.inf), logits, -jnp.inf)

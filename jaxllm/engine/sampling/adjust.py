"""Changes to the logits before temperature: bias, masks, bad words, minimum length, penalties."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.engine.sampling.rows import RowParams, SlotTables, Uses

_LARGEST = np.float32(np.finfo(np.float32).max)


def _occurrences(
    history: jax.Array, rows: RowParams, asked: jax.Array, vocab: int, offset: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """How often each token stands in the prompt and in the output: two int32[R, V]; zeros for rows that do not ask."""
    num_rows, length = history.shape
    index = lax.broadcasted_iota(jnp.int32, (1, length), 1)
    local = history - offset
    counted = asked[:, None] & (index < rows.position[:, None]) & (local >= 0) & (local < vocab)
    # One scatter for both: the output's counts stand behind the prompt's. What does not count falls off the end.
    column = jnp.where(counted, jnp.where(index < rows.prompt_len[:, None], local, vocab + local), 2 * vocab)
    counts = jnp.zeros((num_rows, 2 * vocab), jnp.int32)
    counts = counts.at[jnp.arange(num_rows)[:, None], column].add(1, mode="drop")
    return counts[:, :vocab], counts[:, vocab:]


def _penalize(logits: jax.Array, history: jax.Array, rows: RowParams, offset: jax.Array | int) -> jax.Array:
    # A row that does not ask has counted nothing, so its logits stay as they are.
    in_prompt, in_output = _occurrences(history, rows, rows.uses(Uses.PENALTIES), logits.shape[1], offset)
    repetition = rows.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    # A repetition penalty near 0 or infinity must not turn a finite logit into an infinity.
    repeated = jnp.where(jnp.isfinite(logits), jnp.clip(repeated, -_LARGEST, _LARGEST), logits)
    penalized = jnp.where((in_prompt + in_output) > 0, repeated, logits)
    penalized -= rows.frequency[:, None] * in_output.astype(jnp.float32)
    return penalized - jnp.where(in_output > 0, rows.presence[:, None], 0)


def _forbid_completions(
    logits: jax.Array, history: jax.Array, bad_words: jax.Array, rows: RowParams, offset: jax.Array | int
) -> jax.Array:
    """-inf for the last token of each bad word whose other tokens end the output."""
    num_rows, vocab = logits.shape
    prefix, last = bad_words[..., :-1], bad_words[..., -1]
    index = rows.position[:, None] + jnp.arange(-prefix.shape[-1], 0)
    tail = jnp.take_along_axis(history, jnp.clip(index, 0, history.shape[1] - 1), axis=1)
    # Only the output is looked at, as in vLLM: -2 equals neither a token nor the padding.
    tail = jnp.where(index >= rows.prompt_len[:, None], tail, -2)
    ends_so = jnp.all((prefix == -1) | (prefix == tail[:, None, :]), axis=2)
    local = last - offset  # padding, -1, is negative and so falls out below
    forbidden = rows.uses(Uses.BAD_WORDS)[:, None] & ends_so & (local >= 0) & (local < vocab)
    column = jnp.where(forbidden, local, vocab)
    return logits.at[jnp.arange(num_rows)[:, None], column].set(-jnp.inf, mode="drop")


def adjust(
    logits: jax.Array, rows: RowParams, tables: SlotTables, slots: jax.Array, vocab_offset: jax.Array | int = 0
) -> jax.Array:
    """The logits that temperature and filters see, in vLLM's order.

    allowed_token_ids, bad words, min_tokens, logit_bias, then the repetition, frequency and presence penalties.
    A row that does not ask for one of them gets its logits back unchanged, whatever its slot's tables hold.

    Args:
      logits: float32[R, V].
      rows: parameters, R of each.
      tables: the slots' tables.
      slots: int32[R], the slot of each row; any value for rows that ask for nothing.
      vocab_offset: the global id of the first column.

    Returns:
      float32[R, V]; -inf for tokens that may not be chosen.
    """
    slots = jnp.clip(slots, 0, tables.history.shape[0] - 1)
    biased = rows.uses(Uses.BIAS)[:, None]
    logits = jnp.where(biased, logits + tables.bias[slots], logits)
    early = rows.uses(Uses.STOP_MASK) & (rows.position < rows.min_len)
    logits = jnp.where(early[:, None] & tables.stop_mask[slots], -jnp.inf, logits)

    def with_history(logits: jax.Array) -> jax.Array:
        history = tables.history[slots]
        logits = _forbid_completions(logits, history, tables.bad_words[slots], rows, vocab_offset)
        return _penalize(logits, history, rows, vocab_offset)

    wanted = jnp.any(rows.uses(Uses.PENALTIES | Uses.BAD_WORDS))
    return lax.cond(wanted, with_history, lambda logits: logits, logits)

"""What the sampler reads: parameters of the batch's rows and tables of the engine's slots."""

import dataclasses
import enum

import jax


class Uses(enum.IntFlag):
    """Which of its slot's tables a row reads."""

    NOTHING = 0
    BIAS = 1  # logit_bias, allowed_token_ids, bad words of one token
    STOP_MASK = 2  # min_tokens
    BAD_WORDS = 4  # bad words of several tokens; they read the history too
    PENALTIES = 8  # the history
    GRAMMAR = 16  # the mask of structured outputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
    """The parameters of R rows. All zeros is a valid row that asks for nothing: padding.

    Attributes:
      seed: uint32[R, 2], the 64-bit seed, high word first.
      position: int32[R], how many tokens stand before the one being sampled; below 2**28.
      temperature: float32[R], 0 for greedy rows.
      top_k: int32[R], 0 disables.
      top_p: float32[R], 1 disables.
      min_p: float32[R], 0 disables.
      presence, frequency, repetition: float32[R], the penalties.
      prompt_len: int32[R]; tokens from this index on are output.
      min_len: int32[R]; stop tokens are forbidden while position is below it.
      flags: int32[R] of `Uses`.
    """

    seed: jax.Array
    position: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    prompt_len: jax.Array
    min_len: jax.Array
    flags: jax.Array

    def uses(self, table: Uses) -> jax.Array:
        """bool[R]: which rows read one of these tables."""
        return (self.flags & int(table)) != 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotTables:
    """State of the engine's slots, resident on the device. A slot's rows are stale unless its request wrote them.

    Attributes:
      history: int32[slots, L], the tokens of each slot's sequence, valid before its position.
      bias: float32[slots, V], added to the logits; -inf forbids.
      stop_mask: bool[slots, V], tokens forbidden while a sequence is shorter than min_len.
      bad_words: int32[slots, 128, 16], token sequences left-padded with -1.
    """

    history: jax.Array
    bias: jax.Array
    stop_mask: jax.Array
    bad_words: jax.Array

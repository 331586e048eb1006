"""The host's side of sampling: each slot's parameters as one row of integers, and the tables that some slots need."""

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.core.request import Request
from jaxllm.core.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingParams
from jaxllm.engine.sampling.rows import RowParams, Uses
from jaxllm.text.bad_words import check_bad_words

_ROW = np.dtype(
    [
        ("seed_high", np.uint32),
        ("seed_low", np.uint32),
        ("position", np.int32),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("repetition", np.float32),
        ("prompt_len", np.int32),
        ("min_len", np.int32),
        ("flags", np.int32),
    ]
)
"""The columns of a packed row, 32 bits each."""

NUM_COLUMNS = _ROW.itemsize // 4
_FLOAT = np.finfo(np.float32)
_INT = np.iinfo(np.int32)

TokenSequences = Sequence[Sequence[int]]


def _positive(value: float) -> float:
    """A positive float as a positive normal float32: what is tiny must not become 0, nor what is huge infinity."""
    return min(max(value, float(_FLOAT.tiny)), float(_FLOAT.max))


def needs_tables(params: SamplingParams, bad_words: TokenSequences = ()) -> Uses:
    """Which tables of its slot a request reads: BIAS, STOP_MASK and BAD_WORDS rows have to be written for it, and
    PENALTIES and BAD_WORDS read the history. `bad_words` are the token sequences of `params.bad_words`."""
    uses = Uses.NOTHING
    if params.logit_bias or params.allowed_token_ids is not None or any(len(word) == 1 for word in bad_words):
        uses |= Uses.BIAS
    if params.min_tokens > 0:
        uses |= Uses.STOP_MASK
    if any(len(word) > 1 for word in bad_words):
        uses |= Uses.BAD_WORDS
    if params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1:
        uses |= Uses.PENALTIES
    if params.structured_outputs is not None:
        uses |= Uses.GRAMMAR
    return uses


class SlotParams:
    """The sampling parameters of every slot, kept on the host in the form in which they travel.

    A row is `NUM_COLUMNS` int32 words, floats bit-cast. Slots that no request ever set hold zeros: greedy, no tables.
    """

    def __init__(self, num_slots: int):
        self._rows = np.zeros(num_slots, _ROW)

    def set(self, slot: int, request: Request, bad_words: TokenSequences = ()) -> None:
        """Writes the row of a request that has just been given its slot."""
        params, row = request.params, self._rows[slot]
        seed = request.seed & (2**64 - 1)
        row["seed_high"], row["seed_low"] = seed >> 32, seed & (2**32 - 1)
        row["position"] = 0
        row["temperature"] = _positive(params.temperature) if params.temperature > 0 else 0
        row["top_k"] = min(params.top_k, _INT.max)
        row["top_p"], row["min_p"] = params.top_p, params.min_p
        row["presence"], row["frequency"] = params.presence_penalty, params.frequency_penalty
        row["repetition"] = _positive(params.repetition_penalty)
        row["prompt_len"] = request.num_prompt_tokens
        row["min_len"] = min(request.num_prompt_tokens + params.min_tokens, _INT.max)
        row["flags"] = needs_tables(params, bad_words)

    def take(self, slots: Sequence[int] | np.ndarray, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """int32[R, NUM_COLUMNS]: the rows of these slots at these positions; zeros (padding) for negative slots."""
        slots = np.asarray(slots, np.intp)
        rows = self._rows[slots]
        rows["position"] = positions
        rows[slots < 0] = np.zeros((), _ROW)
        return rows.view(np.int32).reshape(len(slots), NUM_COLUMNS)


def unpack(block: jax.Array) -> RowParams:
    """The rows of `SlotParams.take`, on the device. block: int32[R, NUM_COLUMNS]."""
    columns: dict[str, jax.Array] = {}
    for index, (name, (dtype, *_)) in enumerate((_ROW.fields or {}).items()):
        columns[name] = lax.bitcast_convert_type(block[:, index], dtype)
    seed = jnp.stack([columns.pop("seed_high"), columns.pop("seed_low")], axis=1)
    return RowParams(seed=seed, **columns)


def bias_row(params: SamplingParams, width: int, bad_words: TokenSequences = ()) -> np.ndarray:
    """float32[width], the slot's row of `SlotTables.bias`: logit_bias, and -inf for tokens outside allowed_token_ids
    and for bad words of one token."""
    row = np.zeros(width, np.float32)
    for token, bias in (params.logit_bias or {}).items():
        row[token] = bias
    if params.allowed_token_ids is not None:
        forbidden = np.ones(width, bool)
        forbidden[list(params.allowed_token_ids)] = False
        row[forbidden] = -np.inf
    row[[word[0] for word in bad_words if len(word) == 1]] = -np.inf
    return row


def stop_mask_row(stop_token_ids: Collection[int], width: int) -> np.ndarray:
    """bool[width], the slot's row of `SlotTables.stop_mask`: the tokens that would end the request."""
    row = np.zeros(width, bool)
    row[[token for token in stop_token_ids if token < width]] = True
    return row


def bad_words_rows(bad_words: TokenSequences) -> np.ndarray:
    """int32[128, 16], the slot's rows of `SlotTables.bad_words`: sequences of several tokens, left-padded with -1."""
    check_bad_words(bad_words)
    rows = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, np.int32)
    for index, word in enumerate(word for word in bad_words if len(word) > 1):
        rows[index, MAX_BAD_WORD_TOKENS - len(word) :] = word
    return rows

"""Runs rows of the reference's kind through the device sampler."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.request import Request
from jaxllm.engine.sampling import (
    EVERYTHING,
    Sampled,
    SamplerVariant,
    SlotParams,
    SlotTables,
    Uses,
    bad_words_rows,
    bias_row,
    needs_tables,
    sample,
    stop_mask_row,
    unpack,
)
from tests.engine.sampling.reference import Row

HISTORY = 64
POISON_TOKEN = 2**31 - 1

jit_sample = jax.jit(sample, static_argnames=("variant", "vocab_size"))


def request_of(row: Row) -> Request:
    return Request(
        id="r",
        tokens=list(row.tokens),
        num_prompt_tokens=row.num_prompt_tokens,
        params=row.params,
        max_tokens=16,
        stop_token_ids=frozenset(row.stop_token_ids),
        seed=row.seed,
    )


def upload(
    rows: Sequence[Row], width: int, slots: Sequence[int], num_slots: int
) -> tuple[SlotParams, SlotTables, np.ndarray]:
    """Parameters and tables as a runner would hold them: poison wherever no request asked for a table.

    Returns also the packed block of the rows.
    """
    params = SlotParams(num_slots)
    history = np.full((num_slots, HISTORY), POISON_TOKEN, np.int32)
    bias = np.full((num_slots, width), np.nan, np.float32)
    stop_mask = np.ones((num_slots, width), bool)
    bad_words = np.full((num_slots, 128, 16), -1, np.int32)
    bad_words[:, :, -1] = np.arange(128)  # forbidden whatever stands before
    for slot, row in zip(slots, rows, strict=True):
        params.set(slot, request_of(row), row.bad_words)
        uses = needs_tables(row.params, row.bad_words)
        if uses & Uses.BIAS:
            bias[slot] = bias_row(row.params, width, row.bad_words)
        if uses & Uses.STOP_MASK:
            stop_mask[slot] = stop_mask_row(row.stop_token_ids, width)
        if uses & Uses.BAD_WORDS:
            bad_words[slot] = bad_words_rows(row.bad_words)
        history[slot, : len(row.tokens)] = row.tokens
    tables = SlotTables(*(jnp.asarray(table) for table in (history, bias, stop_mask, bad_words)))
    return params, tables, params.take(slots, [len(row.tokens) for row in rows])


def run(
    rows: Sequence[Row],
    variant: SamplerVariant = EVERYTHING,
    width: int | None = None,
    slots: Sequence[int] | None = None,
    num_slots: int | None = None,
) -> Sampled:
    """Samples the rows as one batch; `width` pads the vocabulary with NaN."""
    vocab = len(rows[0].logits)
    width = vocab if width is None else width
    slots = list(range(len(rows))) if slots is None else slots
    _, tables, block = upload(rows, width, slots, num_slots or len(rows))
    logits = np.full((len(rows), width), np.nan, np.float32)
    logits[:, :vocab] = [row.logits for row in rows]
    return jit_sample(
        jnp.asarray(logits),
        unpack(jnp.asarray(block)),
        tables,
        jnp.asarray(slots, jnp.int32),
        variant=variant,
        vocab_size=vocab,
    )

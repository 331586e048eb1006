"""How one step's metadata travels: a single int32 array a rank, packed on the host and unpacked on the device.

    [num_rows, num_decodes, num_tokens] [rows: S x ROW] [page updates: G x U x 3] [token ids: T]

The part before the token ids has one size for all steps, so that the sampler does not depend on T.
"""

import dataclasses
from itertools import chain
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.core.batch import Batch
from jaxllm.engine.sampling import NUM_COLUMNS, SlotParams

HEADER = 3
ROW = 4 + NUM_COLUMNS
SLOT, START, LENGTH, SAMPLES = range(4)
_FED = (-1, 1, 1)  # start, length and samples of a row that decodes a token which the device knows


class Unpacked(NamedTuple):
    """The device's view of `StepLayout.pack`.

    Attributes:
      num_rows, num_decodes, num_tokens: int32[].
      rows: int32[S, ROW]: slot, start (-1: the device knows it), length, whether it samples, and the columns of
        `SlotParams`. Padding rows have a slot past the last.
      page_updates: int32[G, U, 3]: slot, index, page.
      token_ids: int32[T], -1 where the device feeds a token it sampled itself.
    """

    num_rows: jax.Array
    num_decodes: jax.Array
    num_tokens: jax.Array
    rows: jax.Array
    page_updates: jax.Array
    token_ids: jax.Array


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """Sizes of the packed array: S slots, G cache groups, U page updates a group and step, T token ids.

    One size for all steps, whatever their rung, so that it can go through one buffer on the device.
    """

    num_slots: int
    num_groups: int
    max_updates: int
    max_tokens: int

    @property
    def fixed(self) -> int:
        """Words before the token ids."""
        return HEADER + self.num_slots * ROW + self.num_groups * self.max_updates * 3

    @property
    def size(self) -> int:
        """Words in all."""
        return self.fixed + self.max_tokens

    def pack(self, batch: Batch | None, slots: np.ndarray, params: SlotParams) -> np.ndarray:
        """int32[size] of a batch (None: an idle rank). At most `max_updates` updates a group.

        slots: int[R], those of the batch's rows.
        """
        out = np.zeros(self.size, np.int32)
        rows = out[HEADER : HEADER + self.num_slots * ROW].reshape(self.num_slots, ROW)
        updates = out[HEADER + rows.size : self.fixed].reshape(self.num_groups, self.max_updates, 3)
        rows[:, SLOT] = updates[:, :, 0] = self.num_slots  # past the last: dropped
        if batch is None:
            return out
        tokens = out[self.fixed :]
        tokens[: batch.num_tokens] = -1
        count = len(batch.rows)
        at = num_decodes = batch.num_fed
        rows[:at, START : SAMPLES + 1] = _FED
        heads = []
        for row in batch.rows[at:]:
            known = row.request.tokens
            start, length = row.start, row.length
            if start >= len(known):
                heads.append((-1, length, row.samples))
            else:
                heads.append((start, length, row.samples))
                part = known[start : start + length]
                tokens[at : at + len(part)] = part
            num_decodes += length == 1
            at += length
        if heads:
            rows[batch.num_fed : count, START : SAMPLES + 1] = heads
        out[:HEADER] = count, num_decodes, at
        rows[:count, SLOT] = slots
        rows[:count, SAMPLES + 1 :] = params.take(slots, np.zeros(count, np.int32))  # `forward` sets the positions
        for group, entries in enumerate(batch.page_updates):
            if entries:
                updates[group, : len(entries)] = np.fromiter(chain.from_iterable(entries), np.int32).reshape(-1, 3)
        return out

    def unpack(self, packed: jax.Array, num_tokens: int) -> Unpacked:
        """Inverse of `pack`, on the device; `num_tokens`: the step's rung."""
        rows_end = HEADER + self.num_slots * ROW
        return Unpacked(
            packed[0],
            packed[1],
            packed[2],
            rows=packed[HEADER:rows_end].reshape(self.num_slots, ROW),
            page_updates=packed[rows_end : self.fixed].reshape(self.num_groups, self.max_updates, 3),
            token_ids=packed[self.fixed : self.fixed + num_tokens],
        )

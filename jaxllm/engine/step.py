"""The two halves of a step, as pure functions of one device's arrays: `forward` to hidden rows, `sample` to tokens.

The tensor-parallel shards of a rank all compute the same from the same metadata; weights, caches, logits and the tables
over the vocabulary are each shard's own part.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.engine.layout import LENGTH, ROW, SAMPLES, SLOT, START, StepLayout, Unpacked
from jaxllm.engine.sampling import (
    GREEDY,
    Sampled,
    SamplerVariant,
    SlotTables,
    apply_grammar_mask,
    logprobs_of,
    sample,
    sample_likeliest,
    unpack,
)
from jaxllm.models.metadata import LinearMetadata, StepMetadata
from pallas_kernels.ragged_paged_attention import AttentionMetadata
from sharding import TENSOR, gather_over, num_shards, shard_start, sum_over

POSITION = 4 + 2  # the column of a packed row that the sampler reads as its position
OUTPUT_COLUMNS = 5  # token, number accepted, logprob, rank, finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """What the device knows of each slot between steps; donated to `forward`.

    Attributes:
      num_computed: int32[S], tokens in the cache.
      page_tables: for each cache group int32[S, P].
    """

    num_computed: jax.Array
    page_tables: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepBuffers:
    """What `forward` leaves for the sampler. The buffers are donated to the next `forward`, which writes to the same
    places: a CUDA graph whose addresses change is uploaded anew, which takes longer than launching it.

    Attributes:
      rows: int32[S, ROW] with true positions.
      last_hidden: [S, embed], the last hidden row of each row.
    """

    rows: jax.Array
    last_hidden: jax.Array


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What the step's code depends on beside its arguments' shapes: all static. `stream_axis`: see StepMetadata."""

    layout: StepLayout
    page_size: int
    backend: str
    treedef: Any
    vocab_size: int
    tensor_shards: int = 1
    stream_axis: str | None = None

    @property
    def vocab_axis(self) -> str | None:
        """The mesh axis over which logits lie in shards."""
        return TENSOR if self.tensor_shards > 1 else None

    def model(self, leaves: Sequence[Any]):
        """The model over these parameters; free inside a trace."""
        return jax.tree.unflatten(self.treedef, leaves)

    @functools.cached_property
    def head(self) -> tuple[int, ...]:
        """Which of the parameters the logits need: an executable's every argument costs its caller time."""
        return tuple(jax.tree.leaves(self.model(range(self.treedef.num_leaves)).head))

    def logits(self, head: Sequence[Any], hidden: jax.Array) -> jax.Array:
        """float32[R, V] of hidden rows [R, embed], with the parameters that `head` names."""
        return self._with_head(head).logits(hidden, LinearMetadata())

    def likeliest(self, head: Sequence[Any], hidden: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """float32[R], int32[R]: the largest logit of hidden rows and its id, see `CausalLM.likeliest`."""
        return self._with_head(head).likeliest(hidden, self.backend)

    def _with_head(self, head: Sequence[Any]):
        leaves = [None] * self.treedef.num_leaves
        for at, leaf in zip(self.head, head, strict=True):
            leaves[at] = leaf
        return self.model(leaves)


def apply_page_updates(page_tables: tuple[jax.Array, ...], updates: jax.Array) -> tuple[jax.Array, ...]:
    """updates: int32[G, U, 3] of (slot, index, page); slots past the last are dropped."""
    return tuple(
        table.at[updates[g, :, 0], updates[g, :, 1]].set(updates[g, :, 2], mode="drop")
        for g, table in enumerate(page_tables)
    )


def attention_metadata(
    unpacked: Unpacked,
    starts: jax.Array,
    lengths: jax.Array,
    page_tables: tuple[jax.Array, ...],
    page_size: int,
    decodes_only: bool,
) -> tuple[AttentionMetadata, ...]:
    """Everything that attention needs, derived from each row's slot, start and length. starts, lengths: int32[S']."""
    num_rows, num_tokens = starts.shape[0], unpacked.token_ids.shape[0]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    is_real = token < unpacked.num_tokens
    if decodes_only:
        query_starts = jnp.minimum(jnp.arange(num_rows + 1, dtype=jnp.int32), unpacked.num_rows)
        row_ids, positions = token, jnp.where(is_real, starts, 0)
    else:
        query_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lengths, dtype=jnp.int32)])
        row_ids = jnp.searchsorted(query_starts[1:], token, side="right", method="compare_all").astype(jnp.int32)
        row_ids = jnp.minimum(row_ids, num_rows - 1)
        positions = jnp.where(is_real, starts[row_ids] + token - query_starts[row_ids], 0)
    slots = unpacked.rows[:num_rows, SLOT]
    groups = []
    for table in page_tables:
        tables = table.at[slots].get(mode="fill", fill_value=0)
        pages = tables[row_ids, positions // page_size]
        write_slots = jnp.where(is_real, pages * page_size + positions % page_size, token % page_size)
        groups.append(
            AttentionMetadata(
                positions=positions,
                row_ids=row_ids,
                query_starts=query_starts,
                kv_lens=jnp.where(lengths > 0, starts + lengths, 0),
                page_tables=tables,
                write_slots=write_slots,
                num_rows=unpacked.num_rows,
                num_decodes=unpacked.num_decodes,
                decodes_only=decodes_only,
            )
        )
    return tuple(groups)


def forward(
    shape: StepShape,
    num_tokens: int,
    decodes_only: bool,
    all_hidden: bool,
    leaves: list[jax.Array],
    caches: list[jax.Array],
    state: SlotState,
    buffers: StepBuffers,
    history: jax.Array,
    packed: jax.Array,
    peers: jax.Array | None = None,
):
    """Computes a batch's tokens into the caches.

    Args:
      num_tokens: static, the step's rung.
      decodes_only: static; True promises that every row has one token.
      all_hidden: static; whether to compute and return the hidden rows of all tokens, and not only each row's last.
      leaves: the model's parameters.
      caches: one array a layer (donated).
      state: the slots' state (donated).
      buffers: those of an earlier step (donated); what is in them is not read.
      history: int32[S, L], tokens by slot and position, for those that the host does not know (donated, so that a TPU
        does not fetch all of it into VMEM for the few that are read; comes back as it was).
      packed: int32[size], see `StepLayout`.
      peers: see `StepMetadata`.

    Returns:
      (caches, state, buffers, history, [num_tokens, embed] or None without `all_hidden`).
    """
    del buffers
    unpacked = shape.layout.unpack(packed, num_tokens)
    num_slots = shape.layout.num_slots
    page_tables = apply_page_updates(state.page_tables, unpacked.page_updates)
    slots = unpacked.rows[:, SLOT]
    known = state.num_computed.at[slots].get(mode="fill", fill_value=0)
    starts = jnp.where(unpacked.rows[:, START] < 0, known, unpacked.rows[:, START])
    lengths = unpacked.rows[:, LENGTH]
    ends = starts + lengths
    num_computed = state.num_computed.at[slots].set(ends, mode="drop")

    num_rows = min(num_slots, num_tokens)
    attention = attention_metadata(
        unpacked, starts[:num_rows], lengths[:num_rows], page_tables, shape.page_size, decodes_only
    )
    positions, row_ids = attention[0].positions, attention[0].row_ids
    sampled = history.at[slots[row_ids], positions].get(mode="clip")
    token_ids = jnp.where(unpacked.token_ids < 0, sampled, unpacked.token_ids)
    model = shape.model(leaves)
    ends_at = jnp.maximum(attention[0].query_starts[1:] - 1, 0)  # each row's last token
    wanted = None if decodes_only or all_hidden or num_rows == num_tokens else ends_at
    metadata = StepMetadata(attention, LinearMetadata(), wanted, shape.backend, shape.stream_axis, peers)
    hidden, caches = model(token_ids, caches, metadata)

    last = hidden if decodes_only or wanted is not None else hidden[ends_at]
    last_hidden = jnp.pad(last, ((0, num_slots - num_rows), (0, 0)))
    rows = unpacked.rows.at[:, POSITION].set(ends)
    buffers = StepBuffers(rows, last_hidden)
    return caches, SlotState(num_computed, page_tables), buffers, history, hidden if all_hidden else None


def sample_rows(
    shape: StepShape,
    variant: SamplerVariant,
    num_rows: int,
    gather_axis: str | None,
    head: list[jax.Array],
    hidden: jax.Array,
    rows: jax.Array,
    history: jax.Array,
    tables: tuple[jax.Array, jax.Array, jax.Array] | None,
    masks: jax.Array | None = None,
):
    """Samples the first `num_rows` rows and remembers their tokens.

    Args:
      gather_axis: static, the mesh axis of data-parallel ranks whose outputs all of them return, one after another;
        None: each returns its own.
      head: the parameters of the logits, see `StepShape`.
      hidden: [S, embed], each row's last hidden row.
      rows: int32[S, ROW] from `forward`.
      history: int32[S, L] (donated): gets the tokens of the rows that sample.
      tables: bias, stop_mask and bad_words of `SlotTables`; None for variants without `adjust`.
      masks: int32[S, ceil(V / 32)], see `apply_grammar_mask`; None for variants that are not `masked`.

    Returns:
      (history, int32[num_rows, OUTPUT_COLUMNS + 2 N] as `unpack_output` reads it).
    """
    rows = rows[:num_rows]
    slots = rows[:, SLOT]
    params = unpack(rows[:, 4:])
    axis = shape.vocab_axis
    likeliest = shape.likeliest(head, hidden[:num_rows]) if variant == GREEDY else None
    if likeliest is not None:
        out = sample_likeliest(*likeliest, axis)
    else:
        logits = shape.logits(head, hidden[:num_rows])
        slot_tables = None if tables is None else SlotTables(history, *tables)
        in_range = jnp.minimum(slots, shape.layout.num_slots - 1)
        start = shard_start(logits.shape[1], axis)
        if masks is not None:
            logits = apply_grammar_mask(logits, params, masks, in_range, start)
        out = sample(logits, params, slot_tables, in_range, variant, shape.vocab_size, start, axis)
    writes = jnp.where(rows[:, SAMPLES] > 0, slots, shape.layout.num_slots)
    history = history.at[writes, params.position].set(out.tokens[:, 0], mode="drop")
    output = pack_output(out)
    if gather_axis is not None:
        output = gather_over(output, gather_axis).reshape(-1, output.shape[1])
    return history, output


def pack_output(out: Sampled) -> jax.Array:
    """One array, so that one transfer brings a step's results to the host."""

    def bits(x):
        return lax.bitcast_convert_type(x, jnp.int32)

    columns = [out.tokens, out.num_accepted[:, None], bits(out.logprob)[:, None], out.rank[:, None]]
    columns += [out.finite.astype(jnp.int32)[:, None], out.top_ids, bits(out.top_logprobs)]
    return jnp.concatenate(columns, axis=1)


def write_masks(table: jax.Array, slots: jax.Array, masks: jax.Array) -> jax.Array:
    """Writes int32[M, W] masks to these slots of the table int32[S, W]; slots past the last are dropped."""
    return table.at[slots].set(masks, mode="drop")


def wide_logprobs(
    shape: StepShape,
    k: int,
    rank_axis: str | None,
    head: list[jax.Array],
    hidden: jax.Array,
    index: jax.Array,
    targets: jax.Array,
):
    """Logprobs of `targets` int32[C] and of the k most likely tokens, at rows `index` int32[C] of hidden [N, embed].

    rank_axis: the mesh axis of data-parallel ranks, None if there is one. Rows count over all ranks; each gives the
    others those that it has, and all compute the same.
    """
    rows = _rows_of_all_ranks(hidden, index, rank_axis)
    logits = shape.logits(head, rows)
    axis = shape.vocab_axis
    return logprobs_of(logits, targets, k, shape.vocab_size, shard_start(logits.shape[1], axis), axis)


def pooled_rows(rank_axis: str | None, hidden: jax.Array, index: jax.Array) -> jax.Array:
    """float32[C, embed], rows `index` int32[C] of hidden [N, embed]; `rank_axis` as in `wide_logprobs`."""
    return _rows_of_all_ranks(hidden, index, rank_axis).astype(jnp.float32)


def _rows_of_all_ranks(hidden: jax.Array, index: jax.Array, rank_axis: str | None) -> jax.Array:
    if rank_axis is None:
        return hidden[index]
    local = index - shard_start(hidden.shape[0], rank_axis)
    mine = (local >= 0) & (local < hidden.shape[0])
    return sum_over(jnp.where(mine[:, None], hidden[jnp.where(mine, local, 0)], 0), rank_axis)


def upload_row(
    rank_axis: str | None, vocab_axis: str | None, table: jax.Array, slot: jax.Array, row: jax.Array
) -> jax.Array:
    """Writes one slot's row of a rank's table [S, …].

    rank_axis: the mesh axis of data-parallel ranks, None if there is one; `slot` counts over all of them.
    vocab_axis: the mesh axis over which the table's columns lie in shards; `row` is whole, and may lack the padding.
    """
    if vocab_axis is not None:
        width = table.shape[1]
        row = jnp.pad(row, (0, num_shards(vocab_axis) * width - row.shape[0]))
        row = lax.dynamic_slice_in_dim(row, shard_start(width, vocab_axis), width)
    if rank_axis is None:
        return table.at[slot].set(row)
    local = slot - shard_start(table.shape[0], rank_axis)
    local = jnp.where((local >= 0) & (local < table.shape[0]), local, table.shape[0])
    return table.at[local].set(row, mode="drop")


assert ROW >= POSITION

"""From batches to device arrays and back: owns weights, caches and slots' state, launches steps and reads them."""

import dataclasses
import functools
import operator
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm.core.batch import Batch
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine.compile import Executables
from jaxllm.engine.executables import (
    MANY_UPDATES,
    SAMPLER_TABLES,
    WIDE_ROWS,
    Forward,
    Lowering,
    MakeTables,
    Sample,
    Stage,
    UpdatePages,
    Upload,
    Wide,
    row_rungs,
    warm_up_order,
)
from jaxllm.engine.layout import StepLayout
from jaxllm.engine.resolve import EnginePlan
from jaxllm.engine.sampling import (
    MAX_LOGPROBS,
    VARIANTS,
    SamplerVariant,
    SlotParams,
    Uses,
    bad_words_rows,
    bias_row,
    is_wide,
    needs_tables,
    stop_mask_row,
    variant_for,
)
from jaxllm.engine.step import OUTPUT_COLUMNS, SlotState, StepBuffers, StepShape
from sharding import replicated, sharded_by_rank


@dataclasses.dataclass(slots=True)
class TokenLogprobs:
    """One position's logprobs: of its token (with its rank, 1 = most likely), and of the most likely tokens."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclasses.dataclass(slots=True)
class RowDetail:
    """What a step brought for a row beside its tokens.

    Attributes:
      logprobs: one a token, if asked for.
      prompt_logprobs: (position, logprobs) of prompt tokens, where asked for.
      finite: False if the row's logits held NaN or infinity, or no token was left to choose.
    """

    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[tuple[int, TokenLogprobs]] = dataclasses.field(default_factory=list)
    finite: bool = True


@dataclasses.dataclass(slots=True)
class StepResult:
    """What a step brought for one rank.

    Attributes:
      tokens: each row's new token; [] for rows that do not sample.
      details: of the rows that have any, by index.
    """

    tokens: list[int | list[int]]
    details: dict[int, RowDetail]

    def detail(self, row: int) -> RowDetail:
        """The row's detail, made if there is none."""
        return self.details.setdefault(row, RowDetail())


@dataclasses.dataclass(slots=True)
class _WideRead:
    """Wide logprobs under way: rows' (rank, row, position or None for a sampled token, target or None)."""

    owners: list[tuple[int, int, int | None]]
    result: tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(slots=True)
class Launched:
    """A step under way on the device."""

    batches: list[Batch | None]
    num_tokens: int  # padded
    output: jax.Array
    num_rows: int
    wide: list[_WideRead]


class Runner:
    """One engine's device side. `launch` returns before the device has finished; `read` waits.

    Args:
      plan: all sizes.
      shape: what the step's code needs to know.
      mesh: (data, tensor).
      leaves: the model's parameters on the mesh.
      executables: compiled from `lowering`.
    """

    def __init__(
        self,
        plan: EnginePlan,
        shape: StepShape,
        mesh: Mesh,
        leaves: list[jax.Array],
        executables: Executables,
        lowering: Lowering,
    ):
        self.plan, self.layout, self.leaves, self.executables = plan, shape.layout, leaves, executables
        self.vocab_size = shape.vocab_size
        self.num_ranks = lowering.ranks
        self._by_rank, self._everywhere = sharded_by_rank(mesh), replicated(mesh)
        self._lowering = lowering
        self.reset()
        self._params = [SlotParams(plan.scheduler.max_num_seqs) for _ in range(self.num_ranks)]
        self._needs = [np.zeros(plan.scheduler.max_num_seqs, np.uint8) for _ in range(self.num_ranks)]  # see _need_of
        self._row_rungs = row_rungs(plan.scheduler.max_num_seqs)
        self.num_steps = self.num_scheduled_tokens = self.num_padded_tokens = 0

    def reset(self) -> None:
        """Makes the caches and the slots' state, all zeros; what was there and steps under way are lost."""
        self._caches: list[jax.Array] = []  # the old ones go first
        self._caches = [_zeros(spec) for spec in self._lowering.caches()]
        self._state: SlotState = jax.tree.map(_zeros, self._lowering.state())
        self._history = _zeros(self._lowering.tables()["history"])
        self._packed = _zeros(self._lowering.packed())
        self._buffers: StepBuffers = jax.tree.map(_zeros, self._lowering.buffers(1))
        self._hidden: dict[int, jax.Array] = {}  # by the step's rung
        self._tables: dict[str, jax.Array] | None = None

    # Launching

    def launch(self, batches: Sequence[Batch | None], bad_words: dict[str, list[list[int]]]) -> Launched:
        """Starts one step of all ranks. `bad_words` are the token sequences of the requests that have any, by id."""
        for rank, batch in enumerate(batches):
            if batch is not None:
                self._admit(rank, batch, bad_words)
        self._send_excess_updates(batches)
        forward = self._forward_key(batches)
        slots = [np.array([row.slot for row in batch.rows] if batch else [], np.intp) for batch in batches]
        need = functools.reduce(
            operator.or_, (int(np.bitwise_or.reduce(need[at])) for need, at in zip(self._needs, slots, strict=True))
        )
        parts = [
            self.layout.pack(batch, at, params) for batch, at, params in zip(batches, slots, self._params, strict=True)
        ]
        buffers = self._run_forward(forward, parts)
        sample = self._sample_key(max(map(len, slots)), need)
        output = self._run_sample(sample, buffers)
        output.copy_to_host_async()
        self.num_steps += 1
        self.num_scheduled_tokens += sum(batch.num_tokens for batch in batches if batch is not None)
        self.num_padded_tokens += forward.num_tokens * self.num_ranks
        wide = []
        if need & _WIDE:
            wide = self._launch_wide(batches, buffers, output, sample.num_rows, forward.num_tokens)
        return Launched(list(batches), forward.num_tokens, output, sample.num_rows, wide)

    def rehearse(self) -> None:
        """Runs every step size and sampler that is compiled twice, on no rows: an executable's first runs load its
        kernels and record its CUDA graph, which no request should wait for."""
        nothing = np.zeros(0, np.intp)
        parts = [self.layout.pack(None, nothing, params) for params in self._params]
        keys = warm_up_order(self.plan)
        steps = [key for key in keys if isinstance(key, Forward) and self.executables.ready(key)]
        samplers = [key for key in keys if isinstance(key, Sample) and self.executables.ready(key)]
        for _ in range(2):
            for step in steps:
                buffers = self._run_forward(step, parts)
            for sampler in samplers:
                if not sampler.variant.adjust:  # its tables are made for the first request that needs them
                    jax.block_until_ready(self._run_sample(sampler, buffers))

    def _run_forward(self, key: Forward, packed: list[np.ndarray]) -> StepBuffers:
        """Runs a step's forward pass over each rank's packed array; what it leaves for the sampler."""
        joined = packed[0] if len(packed) == 1 else np.concatenate(packed)
        self._packed = self.executables.get(Stage())(self._packed, joined)
        run = self.executables.get(key)
        buffers = dataclasses.replace(self._buffers, hidden=self._hidden_of(key.num_tokens))
        self._caches, self._state, buffers = run(
            self.leaves, self._caches, self._state, buffers, self._history, self._packed
        )
        self._buffers, self._hidden[key.num_tokens] = buffers, buffers.hidden
        return buffers

    def _run_sample(self, key: Sample, buffers: StepBuffers) -> jax.Array:
        """Samples what a forward pass has left; int32[rows, columns] as `_read_rank` reads it."""
        extra = tuple(self._sampler_tables().values()) if key.variant.adjust else None
        run = self.executables.get(key)
        self._history, output = run(self.leaves, buffers.last_hidden, buffers.rows, self._history, extra)
        return output

    def _hidden_of(self, num_tokens: int) -> jax.Array:
        """The buffer of a rung's hidden rows, made at its first use: by a transfer, which needs no compiler."""
        if num_tokens not in self._hidden:
            spec = self._lowering.hidden(num_tokens)
            self._hidden[num_tokens] = jax.device_put(np.zeros(spec.shape, spec.dtype), spec.sharding)
        return self._hidden[num_tokens]

    def _forward_key(self, batches: Sequence[Batch | None]) -> Forward:
        num_tokens = max(batch.num_tokens for batch in batches if batch is not None)
        rungs, decodes = self.plan.scheduler.token_rungs, self.plan.decode_rungs
        keys = _forwards(rungs[bisect_left(rungs, num_tokens) :])
        if all(batch.num_tokens == len(batch.rows) for batch in batches if batch is not None):
            keys = _forwards(decodes[bisect_left(decodes, num_tokens) :], True) + keys
        return self.executables.first_ready(keys)

    def _sample_key(self, num_rows: int, need: int) -> Sample:
        counts = self._row_rungs[bisect_left(self._row_rungs, num_rows) :]
        return self.executables.first_ready(_samplers(need & ~_WIDE, counts))

    def _admit(self, rank: int, batch: Batch, bad_words: dict[str, list[list[int]]]) -> None:
        """Writes what the slots of newly admitted requests need."""
        for index in batch.new_slots:
            request, slot = batch.rows[index].request, batch.rows[index].slot
            words = bad_words.get(request.id, [])
            self._params[rank].set(slot, request, words)
            self._needs[rank][slot] = _need_of(request.params)
            uses = needs_tables(request.params, words)
            at = rank * self.plan.scheduler.max_num_seqs + slot
            if uses & (Uses.PENALTIES | Uses.BAD_WORDS):
                row = np.zeros(self.plan.scheduler.max_model_len, np.int32)
                row[: len(request.tokens)] = request.tokens
                self._history = self._upload("history", self._history, at, row)
            for use, table, make in (
                (Uses.BIAS, "bias", lambda r, w: bias_row(r.params, self.vocab_size, w)),
                (Uses.STOP_MASK, "stop_mask", lambda r, w: stop_mask_row(r.stop_token_ids, self.vocab_size)),
                (Uses.BAD_WORDS, "bad_words", lambda r, w: bad_words_rows(w)),
            ):
                if uses & use:
                    tables = self._sampler_tables()
                    tables[table] = self._upload(table, tables[table], at, make(request, words))

    def _sampler_tables(self) -> dict[str, jax.Array]:
        """Made when the first request asks: most never do."""
        if self._tables is None:
            self._tables = dict(zip(SAMPLER_TABLES, self.executables.get(MakeTables())(), strict=True))
        return self._tables

    def _upload(self, name: str, table: jax.Array, slot: int, row: np.ndarray) -> jax.Array:
        slot_array, row_array = jax.device_put((np.int32(slot), row), self._everywhere)
        return self.executables.get(Upload(name))(table, slot_array, row_array)

    def _send_excess_updates(self, batches: Sequence[Batch | None]) -> None:
        """Page updates beyond `layout.max_updates` go ahead of the step, many at a time."""
        room = self.layout.max_updates
        while any(len(u) > room for batch in batches if batch for u in batch.page_updates):
            block = np.zeros((self.num_ranks, self.layout.num_groups, MANY_UPDATES, 3), np.int32)
            block[..., 0] = self.layout.num_slots
            for rank, batch in enumerate(batches):
                for group, updates in enumerate(batch.page_updates if batch else []):
                    excess = updates[room : room + MANY_UPDATES]
                    if excess:
                        block[rank, group, : len(excess)] = excess
                        del updates[room : room + MANY_UPDATES]
            block = jax.device_put(block.reshape(-1, MANY_UPDATES, 3), self._by_rank)
            page_tables = self.executables.get(UpdatePages())(self._state.page_tables, block)
            self._state = dataclasses.replace(self._state, page_tables=page_tables)

    # Wide logprobs

    def _launch_wide(
        self, batches, buffers: StepBuffers, output: jax.Array, num_rows: int, num_tokens: int
    ) -> list[_WideRead]:
        """Starts the row-chunked logprobs of the rows that ask for more than the sampler reports."""
        sampled: dict[int, list[tuple[tuple[int, int, int | None], int]]] = {}
        prompts: dict[int, list[tuple[tuple[int, int, int | None], int, int]]] = {}
        for rank, batch in enumerate(batches):
            at = rank * num_tokens
            for index, row in enumerate(batch.rows if batch else []):
                params = row.request.params
                if row.samples and is_wide(params.logprobs):
                    owner = (rank, index, None)
                    sampled.setdefault(self.vocab_size, []).append((owner, rank * num_rows + index))
                if params.prompt_logprobs is not None:
                    k = self.vocab_size if is_wide(params.prompt_logprobs) else MAX_LOGPROBS
                    entries = prompts.setdefault(k, [])
                    for position in range(
                        row.start + 1, min(row.start + row.length + 1, row.request.num_prompt_tokens)
                    ):
                        source = at + position - 1 - row.start
                        entries.append(((rank, index, position), source, row.request.tokens[position]))
                at += row.length
        reads = []
        slots = self.plan.scheduler.max_num_seqs
        for k, chosen in sampled.items():
            for begin in range(0, len(chosen), WIDE_ROWS):
                part = chosen[begin : begin + WIDE_ROWS]
                at_rows = np.asarray([at for _, at in part])
                # Waits for the step: the price of a rare request, which saves an executable a batch shape.
                targets = np.asarray(output)[at_rows, 0]
                hidden_rows = at_rows // num_rows * slots + at_rows % num_rows
                reads.append(self._wide(k, buffers.last_hidden, hidden_rows, targets, [owner for owner, _ in part]))
        for k, asked in prompts.items():
            for begin in range(0, len(asked), WIDE_ROWS):
                owners, sources, targets = zip(*asked[begin : begin + WIDE_ROWS], strict=True)
                reads.append(self._wide(k, buffers.hidden, np.asarray(sources), np.asarray(targets), list(owners)))
        return reads

    def _wide(self, k: int, hidden: jax.Array, index: np.ndarray, targets: np.ndarray, owners) -> _WideRead:
        def padded(values: np.ndarray) -> np.ndarray:
            return np.pad(values.astype(np.int32), (0, WIDE_ROWS - len(values)))

        run = self.executables.get(Wide(hidden.shape[0] // self.num_ranks, min(k, self.vocab_size)))
        index_array, target_array = jax.device_put((padded(index), padded(targets)), self._everywhere)
        return _WideRead(owners, run(self.leaves, hidden, index_array, target_array))

    # Reading

    def read(self, launched: Launched) -> list[StepResult]:
        """Waits for a step; each rank's results. Raises what the device raised."""
        output = np.asarray(launched.output).reshape(self.num_ranks, launched.num_rows, -1)
        results = [
            StepResult([], {}) if batch is None else _read_rank(output[rank], batch)
            for rank, batch in enumerate(launched.batches)
        ]
        for wide in launched.wide:
            logprob, rank_, ids, tops = (np.asarray(array) for array in wide.result)
            for at, (rank, row, position) in enumerate(wide.owners):
                batch = launched.batches[rank]
                assert batch is not None
                params = batch.rows[row].request.params
                asked = params.logprobs if position is None else params.prompt_logprobs
                count = ids.shape[1] if asked in (-1, None) else min(asked, ids.shape[1])
                entry = TokenLogprobs(
                    float(logprob[at]), int(rank_[at]), ids[at, :count].tolist(), tops[at, :count].tolist()
                )
                detail = results[rank].detail(row)
                if position is None:
                    detail.logprobs = [entry]
                else:
                    detail.prompt_logprobs.append((position, entry))
        return results

    def replace_weights(self, leaves: list[jax.Array]) -> None:
        """New parameters of the same shapes and dtypes, without recompiling. Raises ValueError if they differ."""
        for old, new in zip(self.leaves, leaves, strict=True):
            if old.shape != new.shape or old.dtype != new.dtype:
                raise ValueError(f"a parameter of {old.shape} {old.dtype} cannot become {new.shape} {new.dtype}")
        self.leaves = leaves


_RANDOM, _FILTERS, _ADJUST, _LOGPROBS, _WIDE = (1 << bit for bit in range(5))


def _need_of(params: SamplingParams) -> int:
    """What a request asks of a step, as bits, so that a batch's need is the `or` of its slots'. _WIDE: more than the
    sampler reports."""
    variant = variant_for([params])
    wide = is_wide(params.logprobs) or params.prompt_logprobs is not None
    return (
        _RANDOM * variant.random
        | _FILTERS * variant.filters
        | _ADJUST * variant.adjust
        | _LOGPROBS * (variant.num_logprobs is not None)
        | _WIDE * wide
    )


@functools.cache
def _samplers(need: int, counts: tuple[int, ...]) -> list[Sample]:
    """The samplers that serve such rows, the cheapest first; `counts`: row rungs that hold them."""
    logprobs = MAX_LOGPROBS if need & _LOGPROBS else None
    variant = SamplerVariant(bool(need & _RANDOM), bool(need & _FILTERS), bool(need & _ADJUST), logprobs)
    serving = sorted((v for v in VARIANTS if v.serves(variant)), key=lambda v: v.cost)
    return [Sample(count, variant) for variant in serving for count in counts]


@functools.cache
def _forwards(rungs: tuple[int, ...], decodes_only: bool = False) -> list[Forward]:
    return [Forward(rung, decodes_only) for rung in rungs]


def max_updates(plan: EnginePlan) -> int:
    """Page updates that travel with a step: one for each slot, and the pages of a few hundred prompt tokens."""
    return plan.scheduler.max_num_seqs + 64


def layout_of(plan: EnginePlan) -> StepLayout:
    """The packed metadata's layout for these sizes."""
    return StepLayout(plan.scheduler.max_num_seqs, len(plan.groups), max_updates(plan), plan.scheduler.token_rungs[-1])


def _read_rank(output: np.ndarray, batch: Batch) -> StepResult:
    """output: int32[at least the rows, OUTPUT_COLUMNS + 2 N], see `jaxllm.engine.step.pack_output`."""
    rows = batch.rows
    output = output[: len(rows)]
    finite = output[:, 4]
    result = StepResult(output[:, 0].tolist(), {})
    for index in range(batch.num_fed, len(rows)):
        if not rows[index].samples:
            result.tokens[index] = []
    if not finite.all():
        for index in np.flatnonzero(finite == 0).tolist():
            if rows[index].samples:
                result.tokens[index] = []
                result.detail(index).finite = False
    width = (output.shape[1] - OUTPUT_COLUMNS) // 2
    if width:
        floats = output.view(np.float32)
        for index, row in enumerate(rows):
            asked = row.request.params.logprobs
            if asked is not None and row.samples and not is_wide(asked):
                ids = output[index, OUTPUT_COLUMNS : OUTPUT_COLUMNS + min(asked, width)].tolist()
                start = OUTPUT_COLUMNS + width
                tops = floats[index, start : start + min(asked, width)].tolist()
                entry = TokenLogprobs(float(floats[index, 2]), int(output[index, 3]), ids, tops)
                result.detail(index).logprobs = [entry]
    return result


def _zeros(spec: Any) -> jax.Array:
    return _make_zeros(spec.shape, spec.dtype, spec.sharding)()


@functools.cache
def _make_zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[[], jax.Array]:
    """Compiled once for all layers alike."""
    return jax.jit(lambda: jax.numpy.zeros(shape, dtype), out_shardings=sharding)

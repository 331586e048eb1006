"""From batches to steps and back: which executables a batch needs, what the device does not know yet, what came out."""

import contextlib
import dataclasses
import functools
import operator
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxllm.core.batch import Batch
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine.compile import Executables
from jaxllm.engine.device import Device, begin_read
from jaxllm.engine.executables import MANY_UPDATES, Forward, Sample, WriteMasks, row_rungs, warm_up_order
from jaxllm.engine.grammars import StepMasks
from jaxllm.engine.layout import StepLayout
from jaxllm.engine.pooling import PoolRead, launch_pooling, read_pooling
from jaxllm.engine.resolve import EnginePlan
from jaxllm.engine.results import StepResult, read_rank
from jaxllm.engine.sampling import (
    MAX_LOGPROBS,
    VARIANTS,
    SamplerVariant,
    SlotParams,
    Uses,
    bad_words_rows,
    bias_row,
    is_wide,
    mask_words,
    needs_tables,
    stop_mask_row,
    variant_for,
)
from jaxllm.engine.step import StepShape
from jaxllm.engine.wide import WideRead, WideSizes, launch_wide, read_wide, scores_prompts


@dataclasses.dataclass(slots=True)
class Launched:
    """A step under way on the device; without output until it samples."""

    batches: list[Batch | None]
    num_tokens: int  # padded
    num_rows: int
    need: int  # see _need_of
    output: jax.Array | None = None
    masks: StepMasks | None = None
    wide: list[WideRead] = dataclasses.field(default_factory=list)
    pooling: list[PoolRead] = dataclasses.field(default_factory=list)


class Runner:
    """Launches an engine's steps and reads them. `launch` returns before the device has finished; `read` waits.

    Args:
      plan: all sizes.
      shape: what the step's code needs to know.
      device: the arrays that steps run on.
      num_ranks: data-parallel ranks.

    Attributes:
      seconds_waited: for steps' outputs, in all.
      seconds_launching: in JAX's calls that launch forward passes and samplers and begin the copies back, in all; with
        what an engine that is not warmed up waits there for compilations.
    """

    def __init__(self, plan: EnginePlan, shape: StepShape, device: Device, num_ranks: int):
        self.plan, self.layout, self.device = plan, shape.layout, device
        self.vocab_size = shape.vocab_size
        self.num_ranks = num_ranks
        self._params = [SlotParams(plan.scheduler.max_num_seqs) for _ in range(self.num_ranks)]
        self._needs = [np.zeros(plan.scheduler.max_num_seqs, np.uint8) for _ in range(self.num_ranks)]  # see _need_of
        self.row_rungs = row_rungs(plan.scheduler.max_num_seqs, plan.decode_rungs)
        self.num_steps = self.num_scheduled_tokens = self.num_padded_tokens = 0
        self.seconds_waited = self.seconds_launching = 0.0

    @property
    def executables(self) -> Executables:
        """What steps are made of."""
        return self.device.executables

    # Launching

    def launch(
        self, batches: Sequence[Batch | None], bad_words: dict[str, list[list[int]]], hold: bool = False
    ) -> Launched:
        """Starts one step of all ranks. `bad_words` are the token sequences of the requests that have any, by id.

        hold: leaves the sampling to a call of `sample`, which has to come before the next launch.
        """
        for rank, batch in enumerate(batches):
            if batch is not None:
                self._admit(rank, batch, bad_words)
        self._send_excess_updates(batches)
        slots = [np.array([row.slot for row in batch.rows] if batch else [], np.intp) for batch in batches]
        need = functools.reduce(
            operator.or_, (int(np.bitwise_or.reduce(need[at])) for need, at in zip(self._needs, slots, strict=True))
        )
        parts = [
            self.layout.pack(batch, at, params) for batch, at, params in zip(batches, slots, self._params, strict=True)
        ]
        forward = self._forward_key(batches, all_hidden=bool(need & _WIDE) and scores_prompts(batches))
        with self._launching():
            self.device.forward(forward, parts)
        self.num_steps += 1
        self.num_scheduled_tokens += sum(batch.num_tokens for batch in batches if batch is not None)
        self.num_padded_tokens += forward.num_tokens * self.num_ranks
        launched = Launched(list(batches), forward.num_tokens, max(map(len, slots)), need)
        if not hold:
            self.sample(launched)
        return launched

    def sample(self, launched: Launched, masks: StepMasks | None = None) -> None:
        """Samples what a launched step has computed; `masks` are those of its rows under a grammar."""
        assert launched.output is None, "a step samples once"
        launched.masks = masks
        key = self._sample_key(launched.num_rows, launched.need)
        launched.num_rows = key.num_rows
        with self._launching():
            if masks is not None:
                self.device.write_masks(masks.slots, masks.words)
            launched.output = output = self.device.sample(key)
            begin_read(output)
        if launched.need & _WIDE:
            sizes = WideSizes(key.num_rows, self.plan.scheduler.max_num_seqs, launched.num_tokens, self.vocab_size)
            launched.wide = launch_wide(self.device, launched.batches, output, sizes)
        if launched.need & _POOLING:
            slots = self.plan.scheduler.max_num_seqs
            launched.pooling = launch_pooling(self.device, launched.batches, slots)

    @contextlib.contextmanager
    def _launching(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds_launching += time.perf_counter() - begin

    def rehearse(self) -> None:
        """Runs steps and samplers that are compiled twice, on no rows: an executable's first runs load its kernels and
        record its CUDA graph, which no request should wait for."""
        idle = [[self.layout.pack(None, np.zeros(0, np.intp), params) for params in self._params] for _ in range(2)]
        for packed in idle[1]:
            packed[-1] = 1  # a token that no row has: metadata that are the last step's do not travel
        ready = [key for key in warm_up_order(self.plan) if self.executables.ready(key)]
        steps = [key for key in ready if isinstance(key, Forward)]
        for packed_of_ranks in idle if steps else []:
            for step in steps:
                self.device.forward(step, packed_of_ranks)
            for key in ready:  # the large tables are made for the first request that needs them
                if isinstance(key, WriteMasks):
                    words = np.zeros((self.num_ranks, key.num_masks, mask_words(self.vocab_size)), np.int32)
                    self.device.write_masks(np.full(words.shape[:2], self.layout.num_slots, np.int32), words)
                elif isinstance(key, Sample) and not key.variant.adjust:
                    self.device.read(self.device.sample(key))

    def _forward_key(self, batches: Sequence[Batch | None], all_hidden: bool) -> Forward:
        num_tokens = max(batch.num_tokens for batch in batches if batch is not None)
        rungs, decodes = self.plan.scheduler.token_rungs, self.plan.decode_rungs
        keys = _forwards(rungs[bisect_left(rungs, num_tokens) :], all_hidden=all_hidden)
        if not all_hidden and all(batch.num_tokens == len(batch.rows) for batch in batches if batch is not None):
            keys = _forwards(decodes[bisect_left(decodes, num_tokens) :], True) + keys
        return self.executables.first_ready(keys)

    def _sample_key(self, num_rows: int, need: int) -> Sample:
        counts = self.row_rungs[bisect_left(self.row_rungs, num_rows) :]
        return self.executables.first_ready(_samplers(need & ~(_WIDE | _POOLING), counts))

    def _admit(self, rank: int, batch: Batch, bad_words: dict[str, list[list[int]]]) -> None:
        """Writes what the slots of newly admitted requests need."""
        for index in batch.new_slots:
            request, slot = batch.rows[index].request, batch.rows[index].slot
            words = bad_words.get(request.id, [])
            self._params[rank].set(slot, request, words)
            self._needs[rank][slot] = _need_of(request.params) | _POOLING * request.pooling
            uses = needs_tables(request.params, words)
            at = rank * self.plan.scheduler.max_num_seqs + slot
            if uses & (Uses.PENALTIES | Uses.BAD_WORDS):
                row = np.zeros(self.plan.scheduler.max_model_len, np.int32)
                row[: len(request.tokens)] = request.tokens
                self.device.upload("history", at, row)
            for use, table, make in (
                (Uses.BIAS, "bias", lambda r, w: bias_row(r.params, self.vocab_size, w)),
                (Uses.STOP_MASK, "stop_mask", lambda r, w: stop_mask_row(r.stop_token_ids, self.vocab_size)),
                (Uses.BAD_WORDS, "bad_words", lambda r, w: bad_words_rows(w)),
            ):
                if uses & use:
                    self.device.upload(table, at, make(request, words))

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
            self.device.update_pages(block)

    # Reading

    def read(self, launched: Launched) -> list[StepResult]:
        """Waits for a step; each rank's results. Raises what the device raised."""
        assert launched.output is not None, "a step is read after it has sampled"
        begin = time.perf_counter()
        output = self.device.read(launched.output)[0].reshape(self.num_ranks, launched.num_rows, -1)
        self.seconds_waited += time.perf_counter() - begin
        results = [
            StepResult([], {}) if batch is None else read_rank(output[rank], batch)
            for rank, batch in enumerate(launched.batches)
        ]
        read_wide(self.device, launched.wide, launched.batches, results, launched.masks)
        read_pooling(self.device, launched.pooling, results)
        return results


_RANDOM, _FILTERS, _ADJUST, _LOGPROBS, _WIDE, _MASKED, _POOLING = (1 << bit for bit in range(7))


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
        | _MASKED * variant.masked
    )


@functools.cache
def _samplers(need: int, counts: tuple[int, ...]) -> list[Sample]:
    """The samplers that serve such rows, the cheapest first; `counts`: row rungs that hold them."""
    logprobs = MAX_LOGPROBS if need & _LOGPROBS else None
    random, filters, adjust, masked = (bool(need & bit) for bit in (_RANDOM, _FILTERS, _ADJUST, _MASKED))
    variant = SamplerVariant(random, filters, adjust, logprobs, masked)
    serving = sorted((v for v in VARIANTS if v.serves(variant)), key=lambda v: v.cost)
    return [Sample(count, variant) for variant in serving for count in counts]


@functools.cache
def _forwards(rungs: tuple[int, ...], decodes_only: bool = False, all_hidden: bool = False) -> list[Forward]:
    return [Forward(rung, decodes_only, all_hidden) for rung in rungs]


def max_updates(plan: EnginePlan) -> int:
    """Page updates that travel with a step: one for each slot, and the pages of a few hundred prompt tokens."""
    return plan.scheduler.max_num_seqs + 64


def layout_of(plan: EnginePlan) -> StepLayout:
    """The packed metadata's layout for these sizes."""
    return StepLayout(plan.scheduler.max_num_seqs, len(plan.groups), max_updates(plan), plan.scheduler.token_rungs[-1])

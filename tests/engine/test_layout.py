"""What `StepLayout.pack` sends is what the rows say, however many of them are fed by the device."""

import random
from collections.abc import Iterator

import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.core.kv_cache import CacheGroup, KVCache
from jaxllm.core.request import Request
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.core.scheduler import Scheduler, SchedulerConfig
from jaxllm.engine.layout import LENGTH, SAMPLES, SLOT, START, StepLayout
from jaxllm.engine.runner import _need_of, _samplers
from jaxllm.engine.sampling import NUM_COLUMNS, VARIANTS, SlotParams, variant_for
from tests.engine import tiny

SLOTS, UPDATES = 6, 40


def batches(seed: int) -> Iterator[Batch]:
    """Steps of a scheduler with prompts, chunks, decodes and overlap."""
    rng = random.Random(seed)
    groups = [CacheGroup("full", 200, 4), CacheGroup("window", 200, 4, 9)]
    config = SchedulerConfig(max_num_seqs=SLOTS, max_num_batched_tokens=24, max_model_len=64)
    scheduler, pending = Scheduler(config, KVCache(groups)), None
    for i in range(12):
        tokens = [rng.randrange(1000) for _ in range(rng.randint(1, 30))]
        params = SamplingParams(temperature=i % 3, logprobs=[None, 2][i % 2], max_tokens=20)
        scheduler.add(Request(str(i), tokens, len(tokens), params, rng.randint(1, 20), frozenset(), i))
    while scheduler.has_work:
        batch = scheduler.schedule(0.0)
        if batch is not None:
            yield batch
        if pending is not None:
            scheduler.finish(pending, [rng.randrange(1000) if row.samples else [] for row in pending.rows])
        pending = batch


@pytest.mark.parametrize("seed", range(3))
def test_pack_then_unpack(seed):
    layout, params = StepLayout(SLOTS, 2, UPDATES, 32), SlotParams(SLOTS)
    fed = 0
    for batch in batches(seed):
        for index in batch.new_slots:
            params.set(batch.rows[index].slot, batch.rows[index].request)
        slots = np.array([row.slot for row in batch.rows])
        unpacked = layout.unpack(layout.pack(batch, slots, params), 32)
        assert (unpacked.num_rows, unpacked.num_tokens) == (len(batch.rows), batch.num_tokens)
        assert unpacked.num_decodes == sum(row.length == 1 for row in batch.rows)
        tokens = unpacked.token_ids.tolist()
        for row, packed in zip(batch.rows, unpacked.rows, strict=False):
            known = row.request.tokens
            is_known = row.start < len(known)
            assert packed[SLOT] == row.slot and packed[LENGTH] == row.length and packed[SAMPLES] == row.samples
            assert packed[START] == (row.start if is_known else -1)
            np.testing.assert_array_equal(packed[4:], params.take([row.slot], [0])[0])
            expected = known[row.start : row.start + row.length]
            assert tokens[: row.length] == expected + [-1] * (row.length - len(expected))
            del tokens[: row.length]
        assert not any(tokens), "padding"
        assert (unpacked.rows[len(batch.rows) :, SLOT] == SLOTS).all(), "rows of padding have a slot"
        for group, updates in enumerate(batch.page_updates):
            sent = [tuple(update) for update in unpacked.page_updates[group].tolist()]
            assert sent[: len(updates)] == updates and all(slot == SLOTS for slot, *_ in sent[len(updates) :])
        fed += batch.num_fed
    assert fed > 20 and unpacked.rows.shape == (SLOTS, 4 + NUM_COLUMNS)


def test_an_idle_rank_sends_only_padding():
    layout = StepLayout(SLOTS, 2, UPDATES, 8)
    unpacked = layout.unpack(layout.pack(None, np.zeros(0, np.intp), SlotParams(SLOTS)), 8)
    assert unpacked.num_rows == unpacked.num_tokens == 0 and (unpacked.rows[:, SLOT] == SLOTS).all()


def test_the_needs_of_slots_add_up_to_the_batchs_sampler():
    rng = random.Random(0)
    every = [tiny.mixed_params(i) for i in range(32)] + [SamplingParams(logprobs=-1), SamplingParams(prompt_logprobs=1)]
    for _ in range(200):
        chosen = rng.sample(every, rng.randint(1, 4))
        need = 0
        for params in chosen:
            need |= _need_of(params)
        expected = sorted((v for v in VARIANTS if v.serves(variant_for(chosen))), key=lambda v: v.cost)
        assert [key.variant for key in _samplers(need & 15, (8,))] == expected

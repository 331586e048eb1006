"""What the TPU kernels are said to move, against their own plans and against figures worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention import AttentionMetadata, tpu_plan, tpu_sizes, tpu_traffic

LLAMA = tpu_sizes.Problem(2048, 8, 4, 64, 288, 128, 256, 2, 2)  # Llama 3.1 8B
TOKEN = 8 * 256 * 2  # keys and values of one token in a layer


def step(chip, lengths, kv_lens, **options):
    return tpu_traffic.of_step(chip, LLAMA, lengths, kv_lens, **options)


def test_a_decode_row_reads_whole_tiles_and_writes_one():
    found = step("v6e", [1], [1000], decodes_only=True)
    assert found.keys() == {"ragged_paged_decode"}
    decode = found["ragged_paged_decode"]
    assert (decode.read, decode.written) == (1008 * TOKEN, 16 * TOKEN)
    assert decode.flops == 4 * 32 * 128 * 1024  # four blocks of 256 keys
    assert decode.filler_flops == decode.flops  # two key-value heads a bundle
    windowed = step("v6e", [1], [1000], decodes_only=True, window=100)["ragged_paged_decode"]
    assert windowed.read == 112 * TOKEN  # keys 900 to 999: page 14, and of page 15 what is filled


def test_a_prompt_is_read_once_a_block_of_its_queries():
    found = step("v6e", [2048], [2048], decodes_only=False)  # VMEM for blocks of 1024, of chunks of 256 queries
    assert found["ragged_paged_prefill"].read == (1024 + 2048) * TOKEN
    assert found["ragged_paged_prefill"].flops == 4 * 32 * 128 * 256 * 512 * (1 + 1 + 2 + 2 + 3 + 3 + 4 + 4)
    assert found["ragged_paged_write"].written == 2048 * TOKEN
    assert found["ragged_paged_write"].read == 64 * TOKEN
    assert found["ragged_paged_decode"] == tpu_traffic.Traffic()
    short = step("v6e", [2048], [2048], decodes_only=False, window=128)["ragged_paged_prefill"]
    assert short.flops < 0.6 * found["ragged_paged_prefill"].flops
    assert step("v6e", [1024], [1024], decodes_only=False)["ragged_paged_prefill"].read == 1024 * TOKEN


def test_short_rows_take_parts_of_a_block():
    found = step("v6e", [20, 20], [20, 20], decodes_only=False)["ragged_paged_prefill"]
    assert found.flops == 3 * 4 * 32 * 128 * 32 * 512  # the second row lies in two parts of 32 queries
    assert found.read == 2 * 64 * TOKEN


ROWS, TOKENS = 9, 2048
plan = jax.jit(lambda metadata: (tpu_plan.segments(metadata, 128), tpu_plan.writes(metadata, 64, 64)))


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=6),
    before=st.lists(st.integers(0, 500), min_size=6, max_size=6),
    decodes=st.integers(0, 3),
)
def test_as_many_segments_and_runs_as_the_kernels_plan(lengths, before, decodes):
    all_lengths = [1] * decodes + lengths
    kv_lens = [40] * decodes + [length + old for length, old in zip(lengths, before)]
    starts = np.cumsum([0, *all_lengths])
    rows, width = len(all_lengths), 16
    array = lambda values, size: jnp.asarray(np.pad(values, (0, size - len(values)), mode="edge"), jnp.int32)
    metadata = AttentionMetadata(
        positions=array([0], TOKENS),
        row_ids=array([0], TOKENS),
        query_starts=array(starts, ROWS + 1),
        kv_lens=array(kv_lens, ROWS),
        page_tables=array(1 + np.arange(ROWS * width), ROWS * width).reshape(ROWS, width),
        write_slots=array([0], TOKENS),
        num_rows=jnp.int32(rows),
        num_decodes=jnp.int32(decodes),
    )
    planned, runs = plan(metadata)
    mine = list(tpu_traffic._segments(128, decodes, lengths, kv_lens[decodes:]))
    assert len(mine) == int(planned.total[0])
    for (low, high, origin), row, block in zip(mine, *map(np.asarray, planned[:2])):
        assert low == max(starts[row] - block * 128, 0) and high == min(starts[row + 1] - block * 128, 128)
        assert origin == kv_lens[row] - (starts[row + 1] - block * 128)
    count = int(runs.total[0])
    olds = [
        (int(page), int(part))
        for page, part in zip(np.asarray(runs.old_pages)[:count], np.asarray(runs.old_parts)[:count])
    ]
    fetched = 1 + sum(old != previous for old, previous in zip(olds[1:], olds))
    fetched += int((np.asarray(runs.shifts)[:count] != 0).sum())  # a second block of new tokens
    found = tpu_traffic.write(LLAMA, lengths, kv_lens[decodes:], decodes)
    assert (found.read, found.written) == (fetched * 64 * TOKEN, count * 64 * TOKEN)

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


def test_a_decode_row_reads_whole_tiles_and_writes_two_tokens():
    found = step("v6e", [1], [1000], decodes_only=True)
    assert found.keys() == {"ragged_paged_decode"}
    decode = found["ragged_paged_decode"]
    assert (decode.read, decode.written) == (1000 * TOKEN, 2 * TOKEN)
    assert decode.flops == 4 * 32 * 128 * 1024  # four blocks of 256 keys
    assert decode.filler_flops == decode.flops  # two key-value heads a bundle
    windowed = step("v6e", [1], [1000], decodes_only=True, window=100)["ragged_paged_decode"]
    assert windowed.read == 104 * TOKEN  # keys 900 to 998: page 14, and of page 15 what is filled
    begun = step("v6e", [1], [1], decodes_only=True)["ragged_paged_decode"]
    assert (begun.read, begun.written) == (0, 2 * TOKEN)


def test_a_prompt_is_read_once_a_block_of_its_queries():
    found = step("v6e", [2048], [2048], decodes_only=False)  # VMEM for blocks of 1024, of chunks of 256 queries
    assert found["ragged_paged_prefill"].read == (1024 + 2048) * TOKEN
    # Chunks see whole blocks of 512 keys, but that every second ends with half a block: parts of 32 see a quarter of it
    # and then a half.
    whole, half = 256 * 512, 4 * 32 * (128 + 256)
    assert found["ragged_paged_prefill"].flops == 4 * 32 * 128 * (whole * (0 + 1 + 1 + 2 + 2 + 3 + 3 + 4) + half * 4)
    assert found["ragged_paged_write"].written == 2048 * TOKEN
    assert found["ragged_paged_write"].read == 0  # beyond the new keys and values themselves
    assert found["ragged_paged_decode"] == tpu_traffic.Traffic()
    short = step("v6e", [2048], [2048], decodes_only=False, window=128)["ragged_paged_prefill"]
    assert short.flops < 0.6 * found["ragged_paged_prefill"].flops
    assert step("v6e", [1024], [1024], decodes_only=False)["ragged_paged_prefill"].read == 1024 * TOKEN


def test_short_rows_take_parts_of_a_block():
    found = step("v6e", [20, 20], [20, 20], decodes_only=False)["ragged_paged_prefill"]
    assert found.flops == 3 * 4 * 32 * 128 * 32 * 128  # the second row lies in two parts of 32 queries
    assert found.read == 2 * 24 * TOKEN


def test_writes_move_the_tiles_that_hold_new_tokens():
    written = step("v6e", [20, 20], [20, 120], decodes_only=False)["ragged_paged_write"]
    assert written.written == (24 + 24) * TOKEN  # positions 0 to 19, and 100 to 119, which fill 96 to 119
    # The first row's tokens in three tiles; the second's, tokens 20 to 39, of 16 to 39, and 20 to 27 as they fall into
    # two runs; and the tile with what was at 96 to 99.
    assert written.read == (24 + 24 + 8 - 40) * TOKEN


ROWS, TOKENS = 9, 2048
plan = jax.jit(lambda metadata: (tpu_plan.segments(metadata, 128), tpu_plan.writes(metadata, 64, 64, 8)))


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
    shifts, firsts, lasts = (np.asarray(x)[: int(runs.total[0])] for x in (runs.shifts, runs.firsts, runs.lasts))
    fetched = (-(-(shifts + lasts) // 8) + (firsts > 0)).sum()
    written = (-(-lasts // 8)).sum()
    found = tpu_traffic.write(LLAMA, lengths, kv_lens[decodes:], decodes)
    assert found.read == (int(fetched) * 8 - sum(lengths)) * TOKEN
    assert found.written == int(written) * 8 * TOKEN

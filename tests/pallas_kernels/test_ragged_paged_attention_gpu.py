"""The Hopper kernels under Pallas' GPU interpreter with race detection, and their lowering for CUDA."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import gpu, gpu_write, reference
from pallas_kernels.ragged_paged_attention.gpu_decode import DecodeConfig
from pallas_kernels.ragged_paged_attention.gpu_plan import (
    BEGIN,
    FIRST,
    NEXT,
    PAIR_COST,
    TILES,
    decode_plan,
    prefill_plan,
    streams_of,
)
from pallas_kernels.ragged_paged_attention.gpu_prefill import PrefillConfig
from pallas_kernels.ragged_paged_attention.stress_gpu import make_case, make_metadata, relative_error
from pallas_kernels.ragged_paged_attention.types import CacheSpec

SHAPE = ("tokens", "max_rows", "table_width", "decodes_only", "prefixes", "num_pages")
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
reference_of = jax.jit(reference.ragged_paged_attention, static_argnames=("scale", "window", "cap"))


def run_and_compare(capfd, rows, *, heads=2, kv_heads=1, head_dim=64, page_size=64, sinks=False, blocks=2, **options):
    shape = {key: options.pop(key) for key in SHAPE if key in options}
    pack, then = options.pop("pack", 1), options.pop("then", None)
    args = make_case(
        0,
        rows,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        window=options.get("window"),
        **shape,
    )
    options["scale"] = head_dim**-0.5
    if sinks:
        # Large enough that one which is counted twice, or not at all, shows.
        options["sinks"] = jnp.asarray(np.random.default_rng(1).uniform(2, 5, heads), jnp.float32)
    expected, expected_cache = reference_of(*args, **options)
    consumers = 1 if head_dim > 128 else 2
    prefill_config = None if pack is None else PrefillConfig(blocks=blocks, consumers=consumers, pack=pack)
    out, cache = gpu.ragged_paged_attention(
        *args,
        **options,
        then=then,
        decode_config=DecodeConfig(blocks=blocks, consumers=consumers),
        prefill_config=prefill_config,
        interpret=INTERPRET,
    )
    assert relative_error(out, expected) < 1e-2
    # Page 0 is the dummy page: the reference writes padding there, the kernel does not.
    np.testing.assert_array_equal(np.asarray(cache, np.float32)[1:], np.asarray(expected_cache, np.float32)[1:])
    assert "RACE DETECTED" not in capfd.readouterr().out


# Sizes that tests share, so that their programs are compiled once.
MIXED = dict(tokens=80, max_rows=6, table_width=4, pack=2, num_pages=14)
DECODES = dict(tokens=6, table_width=8, decodes_only=True, num_pages=16)


def test_rows_of_one_token_and_many_with_padding(capfd):
    run_and_compare(capfd, [(1, 150), (1, 1), (70, 75), (3, 130)], **MIXED)


def test_window_cap_and_sinks_over_small_pages(capfd):
    run_and_compare(capfd, [(1, 150), (1, 20), (40, 120)], page_size=16, window=33, cap=5.0, sinks=True, tokens=64)


LLAMA = dict(heads=8, kv_heads=2, head_dim=128)  # two of Llama 3.1 8B's eight groups


def test_heads_of_llama_in_a_mixed_batch(capfd):
    run_and_compare(capfd, [(1, 150), (1, 20), (37, 90), (3, 70)], **LLAMA, tokens=64, pack=4)


def test_heads_of_llama_in_decodes(capfd):
    run_and_compare(capfd, [(1, 150), (1, 64), (1, 1)], **LLAMA, tokens=4, decodes_only=True)


def test_many_tokens_have_a_head_a_tile(capfd, monkeypatch):
    """The sizes that a large prefill gets, at fewer tokens and on fewer blocks."""
    table = gpu._table()
    most = table["pack_below_tokens"]
    assert gpu.tuned_prefill(128, 4, most - 1).pack == 4 and gpu.tuned_prefill(128, 4, most).pack == 1
    small = {"128": table["prefill"]["128"] | {"blocks": 2}}
    monkeypatch.setattr(gpu, "_table", lambda: table | {"prefill": small, "pack_below_tokens": 80})
    assert gpu.tuned_prefill(128, 4, 80).pack == 1
    run_and_compare(capfd, [(1, 70), (66, 100), (3, 20)], heads=4, head_dim=128, tokens=80, pack=None)


@pytest.mark.parametrize("tokens,chunk,real", [(64, 8, 59), (12, 2, 11), (7, 1, 7)])
def test_blocks_write_several_chunks_of_tokens(monkeypatch, tokens, chunk, real):
    """As large prefills do: more chunks than blocks, of several tokens where they can be, the last of them padded."""
    monkeypatch.setattr(gpu_write, "MAX_BLOCKS", 4)
    staged = []

    def stage(shape, dtype, of=plgpu.SMEM):
        staged.append(shape)
        return of(shape, dtype)

    monkeypatch.setattr(plgpu, "SMEM", stage)
    rows = [(1, 20), (real - 1, real + 30)]
    q, k, v, cache, metadata = make_case(0, rows, heads=4, kv_heads=2, head_dim=64, page_size=16, tokens=tokens)
    slots = metadata.write_slots[:real]
    cache = cache.at[slots // 16, :, :, slots % 16].set(jnp.nan)  # what is to be written
    _, expected = reference_of(q, k, v, cache, metadata, scale=0.1)
    assert np.isnan(cache).sum() - np.isnan(expected)[1:].sum() >= real * 2 * 2 * 64
    written = gpu_write.write(cache, jnp.concatenate([q, k, v], axis=1), 4, metadata, interpret=INTERPRET)
    assert staged == [(chunk, 4, 64)] and tokens // chunk > 4
    np.testing.assert_array_equal(np.asarray(written, np.float32)[1:], np.asarray(expected, np.float32)[1:])


def test_group_of_seven_and_scales(capfd):
    scales = {"k_scale": jnp.float32(0.5), "v_scale": jnp.float32(3.0)}
    run_and_compare(capfd, [(1, 70), (1, 3), (5, 30)], heads=7, page_size=32, sinks=True, tokens=64, **scales)


def test_wide_heads(capfd):
    run_and_compare(capfd, [(1, 65), (2, 66)], head_dim=256, page_size=128, tokens=64, blocks=1)


def test_wide_heads_of_which_streams_leave_parts(capfd):
    run_and_compare(capfd, [(1, 200)], head_dim=256, page_size=128, tokens=2, blocks=3, decodes_only=True)


def test_a_row_of_more_parts_than_are_joined_at_once(capfd):
    """20 of 22 streams have a tile each, where merge loads 16 parts together."""
    run_and_compare(capfd, [(1, 20 * 64 - 10)], tokens=2, blocks=11, decodes_only=True, sinks=True)


def test_head_dim_96_is_padded():
    spec = CacheSpec(3, 64, 2, 96, jnp.bfloat16)
    assert gpu.cache_shape(spec).shape == (3, 2, 2, 64, 128)
    q, k, v, cache, metadata = make_case(0, [(1, 20), (5, 40)], heads=2, kv_heads=1, head_dim=96, page_size=16)
    expected, expected_cache = reference_of(q, k, v, cache, metadata, scale=0.1)
    wide = jnp.asarray(np.pad(cache, ((0, 0),) * 4 + ((0, 32),)))
    configs = {"decode_config": DecodeConfig(blocks=1), "prefill_config": PrefillConfig(blocks=1)}
    out, written = gpu.ragged_paged_attention(q, k, v, wide, metadata, scale=0.1, **configs, interpret=INTERPRET)
    assert out.shape == q.shape and written.shape == wide.shape
    assert relative_error(out, expected) < 1e-2
    kept = np.asarray(written, np.float32)[1:]
    np.testing.assert_array_equal(kept[..., :96], np.asarray(expected_cache, np.float32)[1:])
    assert not kept[..., 96:].any()


def test_decodes_only_with_padding(capfd):
    """More rows than streams and fewer: pairs that are cut and pairs that are not; padding comes out as zeros."""
    run_and_compare(capfd, [(1, 130), (1, 1), (1, 64), (1, 400)], **DECODES)
    run_and_compare(capfd, [(1, 65)], tokens=1, decodes_only=True, then=jnp.zeros((128, 256), jnp.bfloat16))


def test_decodes_only_with_everything(capfd):
    options = {"window": 33, "cap": 5.0, "sinks": True, "k_scale": jnp.float32(0.5), "v_scale": jnp.float32(3.0)}
    rows = [(1, 150), (1, 20), (1, 97)]
    run_and_compare(capfd, rows, heads=7, page_size=16, tokens=5, decodes_only=True, **options)


def test_rows_that_share_their_first_pages(capfd):
    """Runs that streams cut and runs that they do not, interleaved, more rows of one prefix than a run may have."""
    lens = [260, 385, 330, 257, 300, 390, 270, 380, 400]
    prefixes = [("a", 4), ("a", 4), ("b", 4), ("a", 4), ("b", 4), ("a", 4), ("b", 4), ("a", 4), ("c", 0)]
    options = {"heads": 16, "tokens": 10, "decodes_only": True, "sinks": True, "prefixes": prefixes}
    run_and_compare(capfd, [(1, n) for n in lens], blocks=3, **options)


def test_shared_pages_of_a_mixed_batch(capfd):
    rows = [(1, 150)] * 7 + [(3, 30)]
    prefixes = [("a", 4)] * 7 + [("b", 0)]
    run_and_compare(capfd, rows, heads=3, page_size=32, tokens=64, cap=5.0, prefixes=prefixes, blocks=1)


@pytest.mark.parametrize(
    "group,split",
    [(1, (1, 1)), (17, (1, 17)), (48, (1, 48)), (49, (2, 25)), (64, (2, 32)), (71, (2, 36)), (128, (3, 43))],
)
def test_large_groups_are_split_evenly(group, split):
    assert gpu.split_group(group) == split


def test_a_group_of_seventeen_in_decodes(capfd):
    options = {"window": 33, "cap": 5.0, "sinks": True, "k_scale": jnp.float32(0.5), "v_scale": jnp.float32(3.0)}
    run_and_compare(capfd, [(1, 150), (1, 20)], heads=17, page_size=16, tokens=3, decodes_only=True, **options)


def test_groups_that_are_split_in_a_mixed_batch(capfd):
    """One of 71 query heads, of 36 each with one of zeros."""
    run_and_compare(capfd, [(1, 150), (1, 1), (5, 70)], heads=71, pack=8, tokens=16, sinks=True)


def test_groups_that_are_split_share_first_pages(capfd):
    """Two key-value heads with two groups of 25 each, runs of two rows, which are as many as the tile has space for."""
    rows, prefixes = [(1, 520), (1, 600)] + [(1, 20)] * 5, [("a", 8)] * 2 + [("b", 0)] * 5
    options = {"heads": 98, "kv_heads": 2, "tokens": 8, "decodes_only": True, "sinks": True, "prefixes": prefixes}
    run_and_compare(capfd, rows, **options)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [17, 24, 32, 48, 64, 71])
@pytest.mark.parametrize("decodes_only", [True, False])
def test_large_groups(capfd, head_dim, group, decodes_only):
    rows = [(1, 130), (1, 64), (1, 1)] + [(33, 70), (2, 2)] * (not decodes_only)
    shape = {"heads": 2 * group, "kv_heads": 2, "head_dim": head_dim, "decodes_only": decodes_only}
    run_and_compare(capfd, rows, tokens=4 if decodes_only else 64, pack=1 if group == 17 else 8, sinks=True, **shape)


def test_decodes_only_without_rows(capfd):
    run_and_compare(capfd, [], **DECODES)


def test_empty_batch_gives_zeros(capfd):
    run_and_compare(capfd, [], **MIXED)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("heads,kv_heads,pack", [(8, 2, 4), (7, 1, 1), (16, 1, 8), (4, 4, 1)])
def test_shapes(capfd, head_dim, page_size, heads, kv_heads, pack):
    rows = [(1, 300), (1, 64), (1, 1), (64, 64), (33, 200), (2, 2)]
    run_and_compare(
        capfd,
        rows,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        pack=pack,
        tokens=128,
        max_rows=8,
        table_width=-(-300 // page_size) + 1,
    )


# Falcon 7B's heads as decodes and in a mixed batch, a group that fills no whole tiles, and one that is split in two.
QUICK_LARGE_GROUPS = ((64, 71, 1, 64, 8), (64, 71, 1, 64, 64), (128, 17, 1, 64, 8), (128, 64, 1, 64, 8))


@pytest.mark.parametrize(
    "head_dim,heads,kv_heads,page_size,tokens",
    [
        (128, 32, 8, 64, 64),
        (128, 32, 8, 64, 2112),  # a head a tile, and eight tokens a chunk of the write
        (128, 32, 8, 64, 8),
        (64, 14, 2, 16, 8),
        (256, 8, 4, 128, 64),
        (128, 8, 1, 64, 8),  # a tensor-parallel shard of Llama 3.3 70B
        (256, 4, 1, 64, 64),  # Gemma 3 1B
        *(
            pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK_LARGE_GROUPS))
            for case in itertools.product((64, 128, 256), (17, 48, 64, 71), (1,), (64,), (8, 64))
        ),
    ],
)
def test_lowers_for_cuda(head_dim, heads, kv_heads, page_size, tokens):
    decodes_only = tokens == 8
    rows = [(1, 70)] if decodes_only else [(1, 70), (5, 9)]
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
    args = make_case(0, rows, tokens=tokens, decodes_only=decodes_only, **shape)
    run = functools.partial(
        gpu.ragged_paged_attention,
        scale=0.1,
        window=None if decodes_only else 40,  # without, rows may share their first pages
        cap=20.0,
        sinks=jnp.zeros(heads, jnp.float32),
    )
    text = jax.jit(run, donate_argnums=3).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "tf.aliasing_output = 1" in text  # the donated cache
    assert ("ragged_paged_prefill" in text) != decodes_only


@pytest.mark.parametrize(
    "tokens,width,prefetched", [(8, 8192, True), (16, 8192, False), (8, 8200, False), (8, 7936, False)]
)
def test_few_rows_prefetch_the_next_weight(tokens, width, prefetched):
    args = make_case(0, [(1, 70)], heads=8, kv_heads=2, head_dim=128, page_size=64, tokens=tokens, decodes_only=True)
    then = jnp.zeros((1024, width), jnp.bfloat16)
    run = jax.jit(functools.partial(gpu.ragged_paged_attention, scale=0.1, then=then))
    text = run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert ("cp.async.bulk.prefetch.tensor" in text) == prefetched


def test_refuses_what_it_lacks():
    with pytest.raises(ValueError, match="page_size 8"):
        gpu.cache_shape(CacheSpec(2, 8, 1, 64, jnp.bfloat16))
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        gpu.cache_shape(CacheSpec(2, 16, 1, 64, jnp.float8_e4m3fn))
    with pytest.raises(ValueError, match="head_dim 512"):
        gpu.cache_shape(CacheSpec(2, 16, 1, 512, jnp.bfloat16))


def walk(plan, kv_heads) -> list[tuple[int, int]]:
    """(pair, tile) of all streams in their order; asserts that a pair's streams are those that the merge will ask."""
    num_runs = len(plan.items) - len(plan.order)
    seen: list[tuple[int, int]] = []
    holders: dict[int, list[int]] = {}
    for stream, (pair, offset, count, segments) in enumerate(plan.streams):
        for _ in range(segments):
            item, head = divmod(int(pair), kv_heads)
            first, tiles, next_item = plan.items[item, [FIRST, TILES, NEXT]]
            here = min(tiles - offset, count)
            seen += [(pair - num_runs * kv_heads, first + offset + i) for i in range(here)]
            holders.setdefault(int(pair), []).append(stream)
            pair = next_item * kv_heads if head + 1 == kv_heads else pair + 1
            offset, count = 0, count - here
        assert count == 0
    for pair, streams in holders.items():
        item, head = divmod(pair, kv_heads)
        begin, tiles = plan.items[item, [BEGIN, TILES]]
        first, last = streams_of(begin, tiles, np.int32(head), plan.counts[0])
        assert streams == list(range(int(first), int(last) + 1))
    return seen


@pytest.mark.parametrize("seed", range(5))
def test_decode_plan_covers_every_tile_once(seed):
    rng = np.random.default_rng(seed)
    kv_heads, streams, tile, window = 3, 7, 64, [None, 100][seed % 2]
    lens = [int(n) for n in rng.integers(1, 600, int(rng.integers(0, 9)))]
    metadata = make_metadata(
        rng, [(1, n) for n in lens] + [(5, 9)], page_size=16, num_pages=400, tokens=16, max_rows=12
    )
    plan = jax.tree.map(np.asarray, decode_plan(metadata, kv_heads, streams, tile, window))
    seen = walk(plan, kv_heads)
    expected = [
        (row * kv_heads + head, tile_index)
        for row, kv_len in enumerate(lens)
        for head in range(kv_heads)
        for tile_index in range((max(0, kv_len - window) if window else 0) // tile, -(-kv_len // tile))
    ]
    assert seen == expected


@pytest.mark.parametrize("share", [0, 4])
def test_streams_have_as_much_to_do_with_ragged_rows(share):
    """Tiles that they read and pairs that they end, counted together, differ by a tile and a pair at either end."""
    rng, kv_heads, streams = np.random.default_rng(0), 8, 264
    lens = [int(n) for n in rng.integers(64, 705, 256)]
    metadata = make_metadata(
        rng, [(1, n) for n in lens], page_size=64, num_pages=2200, tokens=256, max_rows=256, decodes_only=True
    )
    plan = jax.tree.map(np.asarray, decode_plan(metadata, kv_heads, streams, 64, None, page_size=64, shared_rows=share))
    num_runs, loads = len(plan.items) - len(plan.order), []
    assert num_runs == (128 if share else 0) and not plan.items[:num_runs, TILES].any()
    for pair, offset, count, segments in plan.streams:
        load = count
        for _ in range(segments):
            tiles = plan.items[pair // kv_heads, TILES]
            here = min(tiles - offset, count)
            load += PAIR_COST * (offset + here == tiles)
            pair, offset, count = pair + 1, 0, count - here  # every row has keys
        loads.append(load)
    assert max(loads[:-1]) - min(loads[:-1]) <= 2 * (1 + PAIR_COST) and loads[-1] <= max(loads[:-1])


@pytest.mark.parametrize("seed", range(5))
def test_shared_plan_covers_every_key_once(seed):
    """Each row's own tiles and those of its run are all of its tiles; the rows of a run have the same pages there."""
    rng = np.random.default_rng(seed)
    page_size, tile, most = int(rng.choice([16, 64, 128])), 64, 4
    prefixes = [(int(name), 2 * int(name)) for name in rng.integers(0, 5, int(rng.integers(8, 30)))]
    lens = [int(n) + pages * page_size for (_, pages), n in zip(prefixes, rng.integers(1, 300, len(prefixes)))]
    metadata = make_metadata(
        rng, [(1, n) for n in lens] + [(5, 9)], page_size=page_size, num_pages=2000, tokens=64, max_rows=33,
        prefixes=[*prefixes, ("prefill", 0)],
    )  # fmt: skip
    plan = jax.tree.map(np.asarray, decode_plan(metadata, 2, 7, tile, None, page_size=page_size, shared_rows=most))
    num_runs = len(plan.items) - 33
    seen = walk(plan, 2)
    assert len(seen) == len(set(seen)) == 2 * sum(plan.items[:, TILES])
    assert sorted(plan.order) == list(range(33))
    members: dict[int, list[int]] = {}
    for row, item in enumerate(plan.items[num_runs:]):
        first, end, source, run, place, _, tiles, _ = item
        assert source == row and end == (lens[row] if row < len(lens) else 0)
        assert (first + tiles) * tile >= end > (first + tiles - 1) * tile or not end
        assert (first > 0) == (run > 0)
        if run:
            assert first == plan.items[run - 1][6]
            assert plan.order[plan.items[run - 1][4] + place] == row
            members.setdefault(run - 1, []).append(row)
    tables = np.asarray(metadata.page_tables)
    for run, (first, end, source, rows, *_) in enumerate(plan.items[:num_runs]):
        assert rows == len(members.get(run, [])) and rows <= most
        for row in members.get(run, []):
            np.testing.assert_array_equal(tables[row, : -(-end // page_size)], tables[source, : -(-end // page_size)])
            assert end < lens[row] and first == 0
    if page_size > 16:  # rows of one name find each other, however they are mixed
        for name in {name for name, pages in prefixes if pages >= 8}:
            of_name = [row for row, (other, _) in enumerate(prefixes) if other == name]
            alone = [row for row in of_name if not plan.items[num_runs + row][3]]
            assert len(alone) <= (len(of_name) % most == 1)


def test_prefill_plan_is_complete_and_costliest_first():
    rng = np.random.default_rng(0)
    rows = [(1, 50), (70, 100), (2, 300), (64, 64)]
    metadata = make_metadata(rng, rows, page_size=16, num_pages=60, tokens=160, max_rows=6)
    plan, totals = map(np.asarray, prefill_plan(metadata, 32))
    assert list(totals) == [6, 137]
    plan = plan[: totals[0]]
    costs = plan[:, 1] + plan[:, 2]
    assert (np.diff(costs) <= 0).all()
    covered = sorted(token for start, count, _, _ in plan for token in range(start, start + count))
    assert covered == list(range(1, 137))
    np.testing.assert_array_equal(plan[:, 2], np.asarray(metadata.positions)[plan[:, 0]])

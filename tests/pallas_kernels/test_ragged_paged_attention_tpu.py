"""The TPU kernels under Pallas' TPU interpreter, which finds races and fills fresh memory with NaN, against a dense
float64 computation; and how their sizes are chosen. `test_ragged_paged_attention_tpu_compiled` compiles them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.ragged_paged_attention import reference, tpu, tpu_plan, tpu_sizes
from pallas_kernels.ragged_paged_attention.tpu_sizes import DecodeSizes, PrefillSizes, copied_tile, word_tokens
from pallas_kernels.ragged_paged_attention.types import CacheSpec
from tests.pallas_kernels.batches import Case, dense
from tests.pallas_kernels.test_ragged_paged_attention import CASES as SHARED

INTERPRET = pltpu.InterpretParams(detect_races=True)
LONGER = ((1, 150), (1, 1), (1, 16), (1, 33), (1, 97), (40, 120), (3, 70), (17, 17))
EVERYTHING = Case(LONGER, window=45, cap=2.0, sinks=True, scales=True)
# The smallest blocks, so that short rows have many of them and every buffer is used again and again.
SMALL = {"decode_sizes": DecodeSizes(2, 16, 3, 1), "prefill_sizes": PrefillSizes(32, 16, 1, 16)}

CASES = {name: case for name, case in SHARED.items() if case.page_size in tpu.PAGE_SIZES}
IN_A_PLAIN_RUN = ("no rows", "decodes only, all at once", "a window far back", "heads of 96", "heads of 256")


def lay_out(cache: np.ndarray) -> np.ndarray:
    """The reference's layout to the kernels'."""
    wide = tpu.padded_head_dim(cache.shape[4])
    padded = np.pad(cache, ((0, 0),) * 4 + ((0, wide - cache.shape[4]),))
    return np.concatenate([padded[:, 0], padded[:, 1]], axis=3)


def lay_back(cache: np.ndarray, head_dim: int) -> np.ndarray:
    wide = cache.shape[3] // 2
    return np.stack([cache[..., :head_dim], cache[..., wide : wide + head_dim]], axis=1)


def run(case: Case, built, dtype=jnp.float32, interpret=INTERPRET, **sizes):
    q, _, _, k, v, cache, metadata, options = built
    static = {name: options[name] for name in ("scale", "window", "cap")}
    arrays = {name: value for name, value in options.items() if name not in static}
    kernel = jax.jit(functools.partial(tpu.ragged_paged_attention, interpret=interpret, **static, **sizes))
    out, after = kernel(*(jnp.asarray(x.astype(dtype)) for x in (q, k, v, lay_out(cache))), metadata, **arrays)
    return np.asarray(out, np.float32), lay_back(np.asarray(after, np.float32), case.head_dim)


def matters(metadata, num_pages: int, page_size: int, itemsize: int) -> np.ndarray:
    """bool[pages, page_size]: what a step may not change but where it writes. The dummy page may hold anything, as may,
    behind the end of a row, the rest of the tile that is written there, of a decode the rest of the word."""
    found = np.ones((num_pages, page_size), bool)
    found[0] = False
    tables, kv_lens = np.asarray(metadata.page_tables), np.asarray(metadata.kv_lens)
    for row, (table, length) in enumerate(zip(tables, kv_lens)):
        unit = word_tokens(itemsize) if row < metadata.num_decodes else copied_tile(itemsize)
        rest = -length % unit
        if rest:
            found[table[length // page_size], length % page_size : length % page_size + rest] = False
    return found


def expected_cache(case: Case, built) -> np.ndarray:
    """In float32: the new keys and values in their places, all else as it was."""
    _, _, _, k, v, cache, metadata, options = built
    expected = cache.copy()
    slots = np.asarray(metadata.write_slots)[: int(metadata.query_starts[metadata.num_rows])]
    for side, new, scale in ((0, k, options.get("k_scale", 1.0)), (1, v, options.get("v_scale", 1.0))):
        expected[slots // case.page_size, side, :, slots % case.page_size] = new[: len(slots)] / np.float32(scale)
    return expected


def check(capfd, case: Case, **options) -> None:
    built = case.build()
    q, keys, values, _, _, cache, metadata, kwargs = built
    out, after = run(case, built, **options)
    np.testing.assert_allclose(out, dense(case, q, keys, values, kwargs), atol=2e-5, rtol=2e-5)
    kept = matters(metadata, len(cache), case.page_size, 4)
    after, expected = (np.moveaxis(pages, 3, 1)[kept] for pages in (after, expected_cache(case, built)))
    np.testing.assert_allclose(after, expected, rtol=1e-6)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_A_PLAIN_RUN else pytest.mark.slow) for name in CASES]
)
def test_shared_suite(capfd, name):
    """Foreign pages, padding, what left the window and what is not written yet are NaN, and so is fresh VMEM."""
    check(capfd, CASES[name])


def test_many_small_blocks(capfd):
    check(capfd, EVERYTHING, **SMALL)


@pytest.mark.parametrize(
    "window,page_size,sizes",
    [
        (None, 128, PrefillSizes(256, 256, 1, 128)),
        pytest.param(50, 128, PrefillSizes(256, 256, 1, 128), marks=pytest.mark.slow),
        pytest.param(50, 64, PrefillSizes(128, 512, 1, 32), marks=pytest.mark.slow),
        *(pytest.param(window, 16, PrefillSizes(256, 64, 1, 128), marks=pytest.mark.slow) for window in (None, 50)),
    ],
)
def test_short_rows_in_long_blocks(capfd, window, page_size, sizes):
    """Blocks of 128 queries, of which rows of a few tokens, and keys that few see, take parts of 32, with 128 keys or
    all; and blocks that are no larger than such parts."""
    rows = ((1, 40), (3, 50), (40, 200), (2, 90), (130, 300))
    case = Case(rows, num_heads=4, num_kv_heads=1, window=window, page_size=page_size, padding=9)
    check(capfd, case, prefill_sizes=sizes)


def test_heads_split_between_two_cores(capfd):
    """As on v4 and v5p: two cores run at once, each on its own heads."""
    case = dataclasses.replace(EVERYTHING, num_heads=6, head_dim=128, sinks=False, scales=False)
    sizes = {"decode_sizes": DecodeSizes(4, 32, 2, 2), "prefill_sizes": PrefillSizes(64, 32, 2, 32)}
    two_cores = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    check(capfd, case, interpret=two_cores, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("heads,kv_heads", [(8, 2), (7, 1), (4, 4)])
def test_shapes(capfd, head_dim, page_size, heads, kv_heads):
    rows = ((1, 300), (1, 64), (1, 1), (64, 64), (33, 200), (2, 2))
    case = Case(rows, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, page_size=page_size)
    check(capfd, case, chip="v6e")


def test_bfloat16(capfd):
    """Tiles of 8 rows, of which two fill registers; products in bfloat16, so that the weights of values are rounded
    too."""
    case = dataclasses.replace(EVERYTHING, scales=False)
    built = case.build()
    q, keys, values, _, _, cache, metadata, options = built

    def round_off(x):
        return x.astype(jnp.bfloat16).astype(np.float32)

    truth = dense(case, round_off(q), [round_off(x) for x in keys], [round_off(x) for x in values], options)
    out, after = run(case, built, jnp.bfloat16, **SMALL)
    np.testing.assert_allclose(out, truth, atol=0.03, rtol=0.02)
    kept = matters(metadata, len(cache), case.page_size, 2)
    after, expected = (np.moveaxis(pages, 3, 1)[kept] for pages in (after, round_off(expected_cache(case, built))))
    np.testing.assert_array_equal(after, expected)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.int8,
        pytest.param(jnp.float8_e4m3fn, marks=pytest.mark.slow),
        pytest.param(jnp.float8_e5m2, marks=pytest.mark.slow),
    ],
)
def test_caches_of_eight_bits(capfd, dtype):
    """Tiles of 32 rows; both round alike what they write, so that they agree to float32's last bits."""
    case = Case(((1, 70), (1, 33), (40, 100), (3, 7)), page_size=32, window=45)
    q, _, _, k, v, _, metadata, options = case.build()
    options |= {"k_scale": jnp.float32(0.03), "v_scale": jnp.float32(0.02)}
    rng = np.random.default_rng(0)
    num_pages = int(metadata.page_tables.max()) + 1
    shape = (num_pages, 2, case.num_kv_heads, case.page_size, case.head_dim)
    cache = jnp.asarray(rng.normal(scale=40, size=shape).clip(-120, 120).astype(dtype))
    truth, written = jax.jit(reference.ragged_paged_attention, static_argnames=("scale", "window", "cap"))(
        q, k, v, cache, metadata, **options
    )
    sizes = {"decode_sizes": DecodeSizes(2, 32, 3, 1), "prefill_sizes": PrefillSizes(32, 32, 1, 32)}
    kernel = jax.jit(
        functools.partial(
            tpu.ragged_paged_attention,
            interpret=INTERPRET,
            scale=options.pop("scale"),
            window=options.pop("window"),
            cap=options.pop("cap"),
            **sizes,
        )
    )
    out, after = kernel(q, k, v, jnp.asarray(lay_out(np.asarray(cache))), metadata, **options)
    np.testing.assert_allclose(out, truth, atol=3e-5, rtol=3e-5)
    kept = matters(metadata, num_pages, case.page_size, 1)
    after = np.moveaxis(lay_back(np.asarray(after), case.head_dim), 3, 1)[kept].astype(np.float32)
    np.testing.assert_array_equal(after, np.moveaxis(np.asarray(written), 3, 1)[kept].astype(np.float32))
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_a_poisoned_row_keeps_it_to_itself(capfd):
    """Rows share blocks of queries and buffers; NaN in one row's history reaches no other row."""
    case = Case(((1, 40), (1, 20), (5, 40), (4, 30), (6, 20)))
    built = case.build()
    q, keys, values, k, v, cache, metadata, options = built
    truth = dense(case, q, keys, values, options)
    tables = np.asarray(metadata.page_tables)
    for row in (0, 3):
        cache[tables[row, 0]] = np.nan
    out, _ = run(case, (q, keys, values, k, v, cache, metadata, options), **SMALL)
    starts = np.asarray(metadata.query_starts)
    for row in range(5):
        mine = slice(starts[row], starts[row + 1])
        if row in (0, 3):
            assert np.isnan(out[mine]).all()
        else:
            np.testing.assert_allclose(out[mine], truth[mine], atol=2e-5, rtol=2e-5)


# --- sizes -----------------------------------------------------------------------------------------------------------


def problem(**changes) -> tpu_sizes.Problem:
    return dataclasses.replace(tpu_sizes.Problem(2048, 8, 4, 64, 2048, 128, 256, 2, 2), **changes)


@pytest.mark.parametrize("chip", tpu_sizes.chips())
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_tokens": 1, "table_width": 1},
        {"num_kv_heads": 32, "group": 1},
        {"num_kv_heads": 1, "group": 71, "key_lanes": 128, "cache_lanes": 128},
        {"num_kv_heads": 16, "group": 2, "key_lanes": 256, "cache_lanes": 512, "page_size": 128},
        {"page_size": 16, "table_width": 32768},
        {"q_bytes": 4, "cache_bytes": 4},
    ],
)
def test_sizes_fit_the_chip(chip, changes):
    device, wanted = tpu_sizes.chips()[chip], problem(**changes)
    decode, prefill = tpu_sizes.decode_sizes(device, wanted), tpu_sizes.prefill_sizes(device, wanted)
    assert tpu_sizes.decode_vmem(wanted, decode) <= device.vmem_limit_bytes
    assert tpu_sizes.prefill_vmem(wanted, prefill) <= device.vmem_limit_bytes
    for sizes in (decode, prefill):
        assert wanted.num_kv_heads % sizes.parts == 0
        assert sizes.keys % wanted.page_size == 0 and sizes.keys & (sizes.keys - 1) == 0
    assert decode.rows >= decode.buffers - 1  # the ring reaches no further than the next step's page tables
    assert prefill.tokens % 16 == 0 and prefill.tokens & (prefill.tokens - 1) == 0
    if wanted.num_kv_heads % device.cores == 0:
        assert decode.parts % device.cores == 0 and prefill.parts % device.cores == 0


def mesh_of(kind: str) -> AbstractMesh:
    device = AbstractDevice(device_kind=kind, platform="tpu", num_cores=1)
    return AbstractMesh((1,), ("x",), abstract_device=device)


def test_the_chip_is_the_abstract_meshs():
    for kind, name in (("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x"), ("TPU v5", "v5p")):
        with use_abstract_mesh(mesh_of(kind)):
            assert tpu_sizes.chip_of(None) is tpu_sizes.chips()[name]
    with use_abstract_mesh(mesh_of("TPU v3")), pytest.raises(ValueError, match=r"TPU v3.*TPU v4"):
        tpu_sizes.chip_of(None)
    with pytest.raises(ValueError, match=r"v9.*v4, v5e"):
        tpu_sizes.chip_of("v9")


def test_refuses_what_it_lacks():
    with pytest.raises(ValueError, match="page_size 8"):
        tpu.cache_shape(CacheSpec(2, 8, 1, 64, jnp.dtype(jnp.bfloat16)))
    with pytest.raises(ValueError, match=r"page_size 16.*int8.*32"):
        tpu.cache_shape(CacheSpec(2, 16, 1, 64, jnp.dtype(jnp.int8)))
    with pytest.raises(ValueError, match="float16"):
        tpu.cache_shape(CacheSpec(2, 16, 1, 64, jnp.dtype(jnp.float16)))
    with pytest.raises(ValueError, match="head_dim 512"):
        tpu.cache_shape(CacheSpec(2, 16, 1, 512, jnp.dtype(jnp.bfloat16)))
    with pytest.raises(ValueError, match="40000 pages"):
        tpu_sizes.decode_sizes(tpu_sizes.chips()["v6e"], problem(table_width=40000))
    q, _, _, k, v, cache, metadata, options = Case(((1, 5),)).build()
    with pytest.raises(ValueError, match=r"page_size 2|cache_shape"):
        tpu.ragged_paged_attention(q, k, v, jnp.asarray(cache), metadata, **options)
    with pytest.raises(ValueError, match="float16"):
        tpu.ragged_paged_attention(
            q.astype(np.float16), k, v, jnp.asarray(lay_out(cache)), metadata, interpret=INTERPRET, **options
        )


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_plans_cover_every_new_token_once(seed):
    rng = np.random.default_rng(seed)
    lengths = [1] * int(rng.integers(0, 4)) + [int(n) for n in rng.integers(2, 50, int(rng.integers(0, 6)))]
    rows = tuple((n, n + int(rng.integers(0, 70))) for n in lengths)
    metadata = Case(rows, page_size=32, seed=seed).build()[6]
    starts, slots = np.asarray(metadata.query_starts), np.asarray(metadata.write_slots)
    longer = [row for row, length in enumerate(lengths) if length > 1]
    tokens = {token for row in longer for token in range(starts[row], starts[row + 1])}

    plan = jax.jit(tpu_plan.segments, static_argnums=1)(metadata, 16)
    pairs = list(zip(*(np.asarray(x)[: int(plan.total[0])] for x in (plan.rows, plan.blocks)), strict=True))
    assert (
        pairs == sorted(set(pairs)) == sorted({(r, t // 16) for r in longer for t in range(starts[r], starts[r + 1])})
    )

    runs = jax.jit(tpu_plan.writes, static_argnums=(1, 2, 3))(metadata, 16, 32, 8)
    written = {}
    for i in range(int(runs.total[0])):
        page, tile, first, last, source, shift = (int(np.asarray(x)[i]) for x in runs[:-1])
        assert 0 <= first < 8 and source >= 0 and last <= 16
        for at in range(first, last):
            token = source * 8 + shift + at
            assert token not in written
            written[token] = page * 32 + tile * 8 + at
    assert written == {token: slots[token] for token in tokens}

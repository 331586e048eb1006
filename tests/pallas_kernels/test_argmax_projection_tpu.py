"""The TPU kernel of the projection to a row's largest entry against float32, in interpret mode with race detection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.argmax_projection import argmax_projection, has_kernel, reference, tpu
from pallas_kernels.ragged_paged_attention.tpu_sizes import chips


def _inputs(rows: int, depth: int, columns: int, by_columns: bool, seed: int = 0):
    """Small whole numbers, whose products are exact, so that entries are often equal."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (rows, depth)).astype(jnp.bfloat16)
    weight = rng.integers(-2, 3, (columns, depth) if by_columns else (depth, columns)).astype(jnp.bfloat16)
    return jnp.asarray(x), jnp.asarray(weight)


def _run(x, weight, num_valid, parts: int = 1, **options):
    interpret = pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="uninitialized",
        num_cores_or_threads=parts,
    )
    return tpu.argmax_projection(x, weight, num_valid, parts=parts, interpret=interpret, chip="v5e", **options)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "strip", "parts", "num_valid"),
    [
        (64, 1024, 256, 1, 1024),
        (80, 1100, 256, 1, 1100),  # the last strip is no whole one
        (64, 1100, 256, 2, 1090),  # as many strips as parts do not divide; a padded vocabulary
        (64, 1024, 512, 2, 300),  # a shard whose second part has nothing valid
        (64, 1024, 512, 2, 0),  # one that has nothing
    ],
)
def test_kernel_against_float32(capfd, by_columns, rows, columns, strip, parts, num_valid):
    x, weight = _inputs(rows, 128, columns, by_columns)
    largest, at = _run(x, weight, num_valid, parts, by_columns=by_columns, columns=strip)
    wide = [np.asarray(each, np.float32) for each in (x, weight)]
    expected, first = reference.argmax_projection(*wide, num_valid, by_columns=by_columns)
    np.testing.assert_array_equal(largest, expected)
    if num_valid:
        np.testing.assert_array_equal(at, first)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_the_first_of_equal_entries():
    """In other lanes, strips and parts."""
    x, weight = jnp.ones((64, 128), jnp.bfloat16), np.zeros((1024, 128), np.float32)
    for first, second in ((5, 6), (130, 300), (131, 1), (700, 640), (300, 900), (1023, 0)):
        weight[:] = 0
        weight[[first, second]] = 1
        largest, at = _run(x, jnp.asarray(weight, jnp.bfloat16), 1024, 2, by_columns=True, columns=256)
        assert set(np.asarray(largest)) == {128.0} and set(np.asarray(at)) == {min(first, second)}


def test_soft_cap_makes_entries_equal():
    """Of entries that round to the same under the cap the first counts, as if logits had been written. Here the least
    positive one is 20 caps, beyond which every tanh is 1."""
    x, weight = _inputs(64, 128, 1024, True, seed=1)
    largest, at = _run(x, weight, 1024, by_columns=True, columns=256, cap=0.05)
    wide = [np.asarray(each, np.float32) for each in (x, weight)]
    expected, first = reference.argmax_projection(*wide, 1024, by_columns=True, cap=0.05)
    np.testing.assert_array_equal(largest, expected)
    np.testing.assert_array_equal(at, first)
    plain = reference.argmax_projection(*wide, 1024, by_columns=True)[1]
    assert (np.asarray(first) != np.asarray(plain)).any()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_row_that_is_no_number_is_told_and_keeps_to_itself(poison):
    x, weight = _inputs(64, 128, 1024, True)
    whole = _run(x, weight, 1024, by_columns=True, columns=256)
    largest, at = _run(x.at[7, 3].set(poison), weight, 1024, by_columns=True, columns=256)
    others = np.arange(64) != 7
    assert largest[7] == np.inf
    np.testing.assert_array_equal(largest[others], whole[0][others])
    np.testing.assert_array_equal(at[others], whole[1][others])


def test_what_is_not_valid_may_be_anything():
    x, weight = _inputs(64, 128, 1024, True)
    whole = _run(x, weight, 900, by_columns=True, columns=256)
    poisoned = _run(x, weight.at[900:].set(jnp.nan), 900, by_columns=True, columns=256)
    np.testing.assert_array_equal(whole[0], poisoned[0])
    np.testing.assert_array_equal(whole[1], poisoned[1])


@pytest.mark.parametrize("chip", chips())
@pytest.mark.parametrize("rows", [64, 128, 192, 256, 512])
@pytest.mark.parametrize("depth", [1024, 2048, 4096, 8192])
def test_strips_fit(chip, rows, depth):
    device = chips()[chip]
    columns = tpu.columns_of_strip(rows, depth, 2, device)
    if columns is None:
        assert tpu._vmem(rows, depth, tpu.LANES, 2) > device.vmem_limit_bytes
        return
    assert columns % tpu.LANES == 0 and 0 < columns <= tpu.MOST_COLUMNS
    assert tpu._vmem(rows, depth, columns, 2) <= device.vmem_limit_bytes


def test_what_the_kernel_lacks_is_left_to_xla_or_refused():
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 128), (4096, 128)))
    assert has_kernel(x, weight, "tpu", by_columns=True)
    few = jax.ShapeDtypeStruct((32, 128), jnp.bfloat16)
    wide = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    assert not has_kernel(few, weight, "tpu", by_columns=True)
    assert not has_kernel(wide, weight, "tpu", by_columns=True)
    assert not any(has_kernel(x, weight, backend, by_columns=True) for backend in ("reference", "xla", "gpu"))
    with pytest.raises(ValueError, match="T at least 64 and a multiple of 16"):
        tpu.argmax_projection(few, weight, 4096, by_columns=True)
    with pytest.raises(ValueError, match=r"must be \[T, K\]"):
        argmax_projection(x, weight, 4096, by_columns=False, backend="tpu")
    with pytest.raises(ValueError, match="backends are reference, tpu"):
        argmax_projection(x, weight, 4096, by_columns=True, backend="gpu")

"""The GPU kernel of residual sum and norm against float32, in interpret mode with race detection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.add_rms_norm import add_rms_norm, gpu, has_kernel, product, reference

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


def _inputs(tokens: int, width: int, scale: float = 1.0):
    rng = np.random.default_rng(tokens + width)
    x, update = (scale * rng.standard_normal((tokens, width)) for _ in range(2))
    weight = 1.0 + 0.1 * rng.standard_normal(width)
    return tuple(jnp.asarray(array.astype(jnp.bfloat16)) for array in (x, update, weight))


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (5, 1024), (3, 2304), (2, 16384), (7, 256)])
def test_kernel_against_float32(tokens, width, unit_offset):
    x, update, weight = _inputs(tokens, width)
    total, normed = gpu.add_rms_norm(x, update, weight, eps=1e-5, unit_offset=unit_offset, interpret=INTERPRET)
    wide = np.asarray(x + update, np.float32)  # the stream is kept in bfloat16, and the norm is of what is kept
    np.testing.assert_array_equal(np.asarray(total, np.float32), wide)
    factor = np.asarray(weight, np.float32) + (1.0 if unit_offset else 0.0)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * factor
    np.testing.assert_allclose(np.asarray(normed, np.float32), expected, rtol=1.2e-2, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_kernel_equals_reference_at_extremes(scale):
    x, update, weight = _inputs(4, 512, scale)
    got = gpu.add_rms_norm(x, update, weight, eps=1e-5, unit_offset=False, interpret=INTERPRET)
    expected = reference.add_rms_norm(x, update, weight, eps=1e-5, unit_offset=False)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2)


@pytest.mark.parametrize(("rows", "depth", "width"), [(2, 512, 256), (5, 1024, 512), (64, 256, 256), (200, 512, 256)])
def test_a_product_in_parts_is_the_product(rows, depth, width):
    keys = jax.random.split(jax.random.key(rows), 3)
    x, matrix, stream = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, [(rows, depth), (depth, width), (rows, width)], strict=True)
    )
    parts = product(x, matrix / 16, "gpu")
    assert parts.shape == (4, rows, width) and parts.dtype == jnp.float32
    weight = jnp.ones(width, jnp.bfloat16)
    wide = np.asarray(x, np.float32) @ np.asarray(matrix / 16, np.float32) + np.asarray(stream, np.float32)
    few = min(rows, 6)  # the interpreter takes one row after another
    options = {"eps": 1e-5, "unit_offset": False}
    for total, normed in (
        gpu.add_rms_norm(stream[:few], parts[:, :few], weight, **options, interpret=INTERPRET),
        reference.add_rms_norm(stream[:few], parts[:, :few], weight, **options),
    ):
        np.testing.assert_allclose(np.asarray(total, np.float32), wide[:few], rtol=4e-3, atol=4e-3)
        scale = np.sqrt((wide[:few] ** 2).mean(axis=1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(np.asarray(normed, np.float32), wide[:few] / scale, rtol=1.2e-2, atol=4e-3)


@pytest.mark.parametrize(
    ("rows", "depth", "width", "parts"),
    [
        (1, 4096, 4096, 1),  # no product for XLA
        (2, 4096, 4096, 4),
        (8, 14336, 4096, 4),
        (9, 4096, 4096, 1),  # slower in parts
        (48, 4096, 4096, 1),
        (128, 14336, 4096, 4),
        (129, 14336, 4096, 2),  # twice as many tiles
        (256, 2048, 1024, 4),
        (512, 4096, 4096, 1),  # enough tiles without
        (2, 64 * 3, 4096, 1),  # depths that do not divide
        (2, 64 * 6, 4096, 2),
        (2, 4096, 2**14, 1),
    ],
)
def test_how_many_parts(rows, depth, width, parts):
    assert gpu.parts(rows, depth, width) == parts


def test_products_stay_whole_without_a_kernel():
    x, matrix = jnp.ones((2, 512), jnp.bfloat16), jnp.ones((512, 256), jnp.bfloat16)
    assert product(x, matrix, "xla").shape == (2, 256) and product(x, matrix, "reference").dtype == jnp.bfloat16
    assert product(x.astype(jnp.float32), matrix.astype(jnp.float32), "gpu").shape == (2, 256)
    assert product(x, matrix[:, :96], "gpu").shape == (2, 96)


def test_a_row_of_nan_stays_alone():
    x, update, weight = _inputs(3, 256)
    clean = gpu.add_rms_norm(x, update, weight, eps=1e-5, unit_offset=False, interpret=INTERPRET)[1]
    dirty = gpu.add_rms_norm(x.at[1].set(jnp.nan), update, weight, eps=1e-5, unit_offset=False, interpret=INTERPRET)[1]
    clean, dirty = np.asarray(clean), np.asarray(dirty)
    np.testing.assert_array_equal(clean[::2], dirty[::2])
    assert np.isnan(dirty[1].astype(np.float32)).all()


def test_what_the_kernel_lacks_is_refused():
    assert not has_kernel(576 - 64, jnp.float32, "gpu") and not has_kernel(640 + 32, jnp.bfloat16, "gpu")
    assert not has_kernel(2**15, jnp.bfloat16, "gpu") and has_kernel(7, jnp.float32, "reference")
    with pytest.raises(ValueError, match="rows of 96 float32 are not supported on GPU"):
        gpu.add_rms_norm(jnp.ones((1, 96)), jnp.ones((1, 96)), jnp.ones(96), eps=1e-5, unit_offset=False)
    with pytest.raises(ValueError, match=r"update \(2, 2, 4\)"):
        parts = jnp.ones((2, 2, 4), jnp.bfloat16)
        add_rms_norm(jnp.ones((2, 4), jnp.bfloat16), parts, jnp.ones(4), eps=1e-5, backend="reference")
    with pytest.raises(ValueError, match=r"weight \(3,\)"):
        add_rms_norm(jnp.ones((2, 4)), jnp.ones((2, 4)), jnp.ones(3), eps=1e-5, backend="reference")

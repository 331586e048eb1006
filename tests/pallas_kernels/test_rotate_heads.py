"""The GPU kernel that normalizes and rotates heads, against float32, in interpret mode with race detection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.rotate_heads import gpu, has_kernel, reference, rotate_heads

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


def _inputs(tokens: int, heads: int, head_dim: int, normed: bool):
    keys = jax.random.split(jax.random.key(tokens + heads + head_dim), 4)
    x = (3 * jax.random.normal(keys[0], (tokens, heads, head_dim))).astype(jnp.bfloat16)
    angles = jax.random.uniform(keys[1], (tokens, head_dim // 2), maxval=7.0)
    weights = [(1 + 0.3 * jax.random.normal(key, (head_dim,))).astype(jnp.bfloat16) for key in keys[2:]]
    return x, jnp.cos(angles), jnp.sin(angles), tuple(weights) if normed else None


def _expected(x, cos, sin, weights, queries: int, keys: int, unit_offset: bool) -> np.ndarray:
    """Everything in float64, nothing rounded between."""
    wide, cos, sin = (np.asarray(array, np.float64) for array in (x, cos, sin))
    out = wide.copy()
    for index in range(queries + keys):
        head = wide[:, index]
        if weights is not None:
            weight = np.asarray(weights[index >= queries], np.float64) + unit_offset
            head = head / np.sqrt((head**2).mean(axis=1, keepdims=True) + 1e-6) * weight
        first, second = np.split(head, 2, axis=1)
        out[:, index] = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
    return out


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "queries", "keys", "values", "head_dim"),
    [(1, 32, 8, 8, 128), (3, 16, 8, 8, 128), (2, 7, 1, 1, 64), (2, 4, 4, 4, 256), (2, 56, 8, 8, 64)],
)
def test_kernel_against_float64(tokens, queries, keys, values, head_dim, normed):
    x, cos, sin, weights = _inputs(tokens, queries + keys + values, head_dim, normed)
    unit_offset = head_dim == 256  # Gemma's
    options = {"queries": queries, "keys": keys, "norms": weights, "eps": 1e-6, "unit_offset": unit_offset}
    got = gpu.rotate_heads(x, cos, sin, **options, interpret=INTERPRET)
    expected = _expected(x, cos, sin, weights, queries, keys, unit_offset)
    scale = np.abs(expected).max(axis=2, keepdims=True)
    np.testing.assert_array_less(np.abs(np.asarray(got, np.float64) - expected) / scale, 1.2e-2)
    np.testing.assert_array_equal(got[:, queries + keys :], x[:, queries + keys :])  # values pass
    beside = reference.rotate_heads(x, cos, sin, **options)
    np.testing.assert_array_less(np.abs(np.asarray(got, np.float64) - np.asarray(beside, np.float64)) / scale, 1e-2)


def test_a_token_of_nan_stays_alone():
    x, cos, sin, weights = _inputs(3, 24, 64, True)
    options = {"queries": 8, "keys": 8, "norms": weights, "eps": 1e-6, "unit_offset": False, "interpret": INTERPRET}
    clean = gpu.rotate_heads(x, cos, sin, **options)
    dirty = gpu.rotate_heads(x.at[1].set(jnp.nan), cos, sin, **options)
    np.testing.assert_array_equal(clean[::2], dirty[::2])
    assert jnp.isnan(dirty[1]).all()


def test_what_the_kernel_lacks_is_refused():
    assert has_kernel(128, 40, 128, 128, jnp.bfloat16, "gpu") and not has_kernel(64, 40, 128, 128, jnp.bfloat16, "gpu")
    assert not has_kernel(4096, 72, 128, 128, jnp.bfloat16, "gpu")  # more heads than a tile has rows
    assert not has_kernel(4096, 40, 128, 64, jnp.bfloat16, "gpu")  # heads of which only a part turns
    assert has_kernel(1, 9, 96, 48, jnp.float32, "reference")
    x, cos, sin, _ = _inputs(2, 12, 64, False)
    with pytest.raises(ValueError, match="10 heads of 64 bfloat16, of which 64 turn, are not supported on GPU"):
        rotate_heads(x, cos, sin, queries=8, keys=2, backend="gpu")
    with pytest.raises(ValueError, match="or more, head_dim"):
        rotate_heads(x, cos, sin, queries=8, keys=8, backend="reference")
    with pytest.raises(ValueError, match="backend 'tpu' is unknown"):
        rotate_heads(x, cos, sin, queries=8, keys=4, backend="tpu")

"""Norm and rotation of queries and keys on GPU against float64, in interpret mode with race detection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.qk_norm_rope import Heads, gpu, has_kernel, qk_norm_rope

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
reference_of = jax.jit(qk_norm_rope, static_argnames=("heads", "backend"))


def _inputs(tokens: int, heads: Heads, normed: bool):
    rng = np.random.default_rng(tokens + heads.width)
    qkv = jnp.asarray((3 * rng.standard_normal((tokens, heads.width))).astype(jnp.bfloat16))
    angles = rng.uniform(0, 7, (tokens, heads.dim // 2)).astype(np.float32)
    weights = [jnp.asarray((1 + 0.3 * rng.standard_normal(heads.dim)).astype(jnp.bfloat16)) for _ in range(2)]
    return qkv, (jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))), tuple(weights) if normed else None


def _expected(qkv, tables, weights, heads: Heads) -> np.ndarray:
    """[T, all heads, dim], nothing rounded between."""
    wide = np.asarray(qkv, np.float64).reshape(len(qkv), -1, heads.dim)
    cos, sin = (np.asarray(table, np.float64) for table in tables)
    out = wide.copy()
    for index in range(heads.queries + heads.keys):
        head = wide[:, index]
        if weights is not None:
            weight = np.asarray(weights[index >= heads.queries], np.float64) + heads.unit_offset
            head = head / np.sqrt((head**2).mean(axis=1, keepdims=True) + heads.eps) * weight
        first, second = np.split(head, 2, axis=1)
        out[:, index] = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
    return out


def _joined(parts) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.float64) for part in parts], axis=1)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads"),
    [
        (1, Heads(32, 8, 128, 1e-6)),
        (3, Heads(16, 8, 128, 1e-6)),
        (2, Heads(24, 8, 64, 1e-6)),
        (2, Heads(8, 8, 256, 1e-6, unit_offset=True)),  # Gemma's
        (2, Heads(56, 8, 64, 1e-6)),  # as many as a tile has rows
    ],
)
def test_kernel_against_float64(tokens, heads, normed):
    qkv, tables, weights = _inputs(tokens, heads, normed)
    parts = gpu.qk_norm_rope(qkv, tables, weights, heads, interpret=INTERPRET)
    assert [part.shape[1] for part in parts] == [heads.queries, heads.keys, heads.keys]
    got, expected = _joined(parts), _expected(qkv, tables, weights, heads)
    scale = np.abs(expected).max(axis=2, keepdims=True)
    np.testing.assert_array_less(np.abs(got - expected) / scale, 1.2e-2)
    values = np.asarray(qkv)[:, -heads.keys * heads.dim :]
    np.testing.assert_array_equal(np.asarray(parts[2]).reshape(tokens, -1), values)  # they pass
    beside = _joined(reference_of(qkv, tables, weights, heads, backend="reference"))
    np.testing.assert_array_less(np.abs(got - beside) / scale, 1e-2)


def test_a_token_of_nan_stays_alone():
    heads = Heads(8, 8, 64, 1e-6)
    qkv, tables, weights = _inputs(3, heads, True)
    clean = _joined(gpu.qk_norm_rope(qkv, tables, weights, heads, interpret=INTERPRET))
    dirty = _joined(gpu.qk_norm_rope(qkv.at[1].set(jnp.nan), tables, weights, heads, interpret=INTERPRET))
    np.testing.assert_array_equal(clean[::2], dirty[::2])
    assert np.isnan(dirty[1]).all()


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("queries", "keys"), [(32, 8), (8, 8), (40, 16)])
def test_every_supported_head_lowers(queries, keys, dim):
    """Interpreters take tiles and slices of shared memory that Mosaic refuses."""
    heads = Heads(queries, keys, dim, 1e-6)
    run = jax.jit(lambda *inputs: gpu.qk_norm_rope(*inputs, heads))
    run.trace(*_inputs(2, heads, True)).lower(lowering_platforms=("cuda",))


def test_what_the_kernel_lacks_is_left_to_xla_or_refused():
    def offered(tokens: int, heads: Heads, rotated: int, dtype=jnp.bfloat16, is_normed=False) -> bool:
        table, qkv = jax.ShapeDtypeStruct((tokens, rotated // 2), jnp.float32), (tokens, heads.width)
        return has_kernel(jax.ShapeDtypeStruct(qkv, dtype), (table, table), heads, "gpu", is_normed=is_normed)

    llama = Heads(32, 8, 128)
    assert offered(128, llama, 128) and not offered(64, llama, 128)  # XLA's is the faster one
    assert offered(1, Heads(16, 8, 128), 128, is_normed=True)  # of XLA's there would be three
    assert not offered(4096, Heads(64, 8, 128), 128)  # more heads than a tile has rows
    assert not offered(4096, Heads(28, 4, 128), 128)  # 36 heads a token are not made up of tiles of eight
    assert not offered(4096, llama, 64) and not offered(4096, llama, 128, jnp.float32)
    heads = Heads(8, 2, 64)
    qkv, tables, _ = _inputs(2, heads, False)
    with pytest.raises(ValueError, match="10 heads of 64 bfloat16, of which 64 dims are rotated"):
        qk_norm_rope(qkv, tables, None, heads, backend="gpu")

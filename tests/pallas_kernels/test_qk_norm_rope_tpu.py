"""Norm and rotation of queries and keys on TPU against float32, in interpret mode with race detection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxllm.models.rope import Rope, rotate
from pallas_kernels.add_rms_norm import rms_norm
from pallas_kernels.qk_norm_rope import Heads, has_kernel, qk_norm_rope, tpu

INTERPRET = pltpu.InterpretParams(detect_races=True)
reference_of = jax.jit(qk_norm_rope, static_argnames=("heads", "backend"))


def _inputs(tokens: int, heads: Heads, dtype=jnp.bfloat16, rotated: int | None = None):
    rng = np.random.default_rng(tokens)
    qkv = jnp.asarray(rng.standard_normal((tokens, heads.width)).astype(dtype))
    weights = tuple(jnp.asarray(rng.standard_normal(heads.dim).astype(dtype)) for _ in range(2))
    rope = Rope(tuple(10000.0 ** -(np.arange((rotated or heads.dim) // 2) / 64)))
    return qkv, jax.jit(rope.tables)(np.arange(5, tokens + 5, dtype=np.int32)), weights


def _same(got, wanted, **tolerances):
    for left, right in zip(got, wanted, strict=True):
        assert left.shape == right.shape and left.dtype == right.dtype
        np.testing.assert_allclose(np.asarray(left, np.float32), np.asarray(right, np.float32), **tolerances)


@pytest.mark.parametrize(
    ("tokens", "heads", "dtype", "is_normed"),
    [
        (512, Heads(1, 1, 128), jnp.bfloat16, False),  # blocks of 256 rows
        (48, Heads(3, 1, 128, 1e-6), jnp.bfloat16, True),  # of 16
        (32, Heads(1, 1, 256, 1e-6, unit_offset=True), jnp.bfloat16, True),  # halves are whole lanes
        (32, Heads(2, 2, 128, 1e-5), jnp.float32, True),
    ],
)
def test_kernel_against_plain_code(capfd, tokens, heads, dtype, is_normed):
    """The same roundings as models without a kernel: to the last bit but for the order of a norm's sum."""
    qkv, tables, weights = _inputs(tokens, heads, dtype)
    given = weights if is_normed else None
    got = tpu.qk_norm_rope(qkv, tables, given, heads, interpret=INTERPRET)
    assert "RACE DETECTED" not in capfd.readouterr().out
    tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-5
    _same(got, reference_of(qkv, tables, given, heads, backend="reference"), rtol=tolerance, atol=tolerance)
    wide = [jnp.asarray(np.asarray(x, np.float32)) for x in (qkv, *weights)]
    exact = reference_of(wide[0], tables, (wide[1], wide[2]) if is_normed else None, heads, backend="reference")
    errors = [np.abs(np.asarray(x, np.float32) - np.asarray(y)).max() for x, y in zip(got, exact)]
    assert max(errors) < (0.1 if dtype == jnp.bfloat16 else 1e-4)
    np.testing.assert_array_equal(np.asarray(got[2], np.float32), np.asarray(exact[2]))


@pytest.mark.parametrize("rotated", [128, 64])
def test_reference_against_the_models_layers(rotated):
    heads = Heads(4, 2, 128, 1e-6)
    qkv, tables, weights = _inputs(16, heads, rotated=rotated)
    q, k, v = jnp.split(qkv.reshape(16, -1, 128), (4, 6), axis=1)
    q, k = (rms_norm(x, w, eps=1e-6, unit_offset=False) for x, w in zip((q, k), weights))
    _same(qk_norm_rope(qkv, tables, weights, heads, backend="reference"), (rotate(q, tables), rotate(k, tables), v))


def test_a_row_does_not_depend_on_the_others():
    heads = Heads(2, 1, 128, 1e-6)
    qkv, tables, weights = _inputs(64, heads)
    alone = tpu.qk_norm_rope(qkv, tables, weights, heads, interpret=INTERPRET)
    among = tpu.qk_norm_rope(qkv.at[40:].set(jnp.nan), tables, weights, heads, interpret=INTERPRET)
    _same([np.asarray(x)[:40] for x in among], [np.asarray(x)[:40] for x in alone], rtol=0)
    assert all(np.isnan(np.asarray(x, np.float32)[40:]).all() for x in among)


def test_what_the_kernel_lacks_is_left_to_xla_or_refused():
    heads = Heads(2, 1, 128)
    qkv, tables, _ = _inputs(32, heads)
    assert has_kernel(qkv, tables, heads, "tpu", is_normed=True) and not has_kernel(
        qkv, tables, heads, "gpu", is_normed=True
    )
    halved = tuple(table[:, :32] for table in tables)  # part of a head is rotated
    assert has_kernel(qkv, halved, heads, "reference", is_normed=True) and not has_kernel(
        qkv, halved, heads, "tpu", is_normed=True
    )
    short = tuple(table[:24] for table in tables)
    assert not has_kernel(qkv[:24], short, heads, "tpu", is_normed=True)
    assert not has_kernel(qkv, halved, Heads(4, 2, 64), "tpu", is_normed=True)
    with pytest.raises(ValueError, match="T a multiple of 16"):
        tpu.qk_norm_rope(qkv[:24], short, None, heads)
    with pytest.raises(ValueError, match=r"must be \[T, 512\]"):
        qk_norm_rope(qkv[:, 1:], tables, None, heads, backend="reference")
    with pytest.raises(ValueError, match="'xla' is unknown"):
        qk_norm_rope(qkv, tables, None, heads, backend="xla")

"""The GPU kernel of the gated projection against float32, in interpret mode with race detection."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_matmul import gated_matmul, gpu, has_kernel, reference

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
reference_of = jax.jit(reference.gated_matmul, static_argnames="activation")
SMALL = dataclasses.replace(gpu.tuned(), columns=64, blocks=4, slots=3, band=2)


def _inputs(rows: int, depth: int, columns: int):
    rng = np.random.default_rng(rows + depth)
    x = rng.standard_normal((rows, depth)).astype(jnp.bfloat16)
    weight = (rng.standard_normal((depth, 2 * columns)) * depth**-0.5).astype(jnp.bfloat16)
    return jnp.asarray(x), jnp.asarray(weight)


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "changes"),
    [
        (256, 128, 128, {}),  # fewer steps than slots
        (512, 320, 192, {}),  # the ring turns within a tile, tiles are left over
        (512, 128, 192, {"lag": 0}),
        (384, 256, 128, {"cluster": 1, "blocks": 3}),
        (256, 64, 64, {}),  # one tile, one step
    ],
)
def test_kernel_against_float32(rows, depth, columns, changes):
    x, weight = _inputs(rows, depth, columns)
    config = dataclasses.replace(SMALL, **changes)
    got = gpu.gated_matmul(x, weight, activation="silu", config=config, interpret=INTERPRET)
    both = np.asarray(x, np.float32) @ np.asarray(weight, np.float32)
    gate, up = both[:, :columns], both[:, columns:]
    np.testing.assert_allclose(np.asarray(got, np.float32), gate / (1 + np.exp(-gate)) * up, rtol=1e-2, atol=1e-3)


def test_the_other_activation():
    x, weight = _inputs(256, 64, 64)
    got = gpu.gated_matmul(x, weight, activation="gelu_tanh", config=SMALL, interpret=INTERPRET)
    wide = reference_of(*(np.asarray(each, np.float32) for each in (x, weight)), activation="gelu_tanh")
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wide), rtol=1e-2, atol=1e-3)


def test_a_row_does_not_depend_on_the_others():
    x, weight = _inputs(512, 128, 64)
    alone = gpu.gated_matmul(x[:256], weight, activation="silu", config=SMALL, interpret=INTERPRET)
    poisoned = x.at[256:].set(jnp.nan)
    among = gpu.gated_matmul(poisoned, weight, activation="silu", config=SMALL, interpret=INTERPRET)
    np.testing.assert_array_equal(np.asarray(among[:256], np.float32), np.asarray(alone, np.float32))
    assert jnp.isnan(among[256:]).all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_it_lowers_for_the_sizes_that_models_have(activation):
    x, weight = jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1024, 6144), jnp.bfloat16)
    assert has_kernel(x, weight, activation, "gpu")
    run = jax.jit(lambda x, w: gated_matmul(x, w, activation=activation, backend="gpu"))
    run.trace(x, weight).lower(lowering_platforms=("cuda",))


def test_what_the_kernel_lacks_is_refused():
    x, weight = _inputs(128, 64, 64)
    assert not has_kernel(x, weight, "silu", "gpu") and has_kernel(x, weight, "gelu", "reference")
    with pytest.raises(ValueError, match="T a multiple of 256"):
        gated_matmul(x, weight, activation="silu", backend="gpu")
    with pytest.raises(ValueError, match="gelu of x"):
        gpu.gated_matmul(*_inputs(256, 64, 64), activation="gelu", config=SMALL)
    with pytest.raises(ValueError, match=r"weight \(64, 127\)"):
        gated_matmul(x, weight[:, 1:], activation="silu", backend="reference")

"""What checks kernels on a device finds what is wrong; here, the interpreter stands for the device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import stress_gpu
from pallas_kernels.gated_matmul import gpu as gated_matmul
from pallas_kernels.qk_norm_rope import Heads

INTERPRET = dict(interpret=plgpu.InterpretGPUParams())
SMALL = dataclasses.replace(gated_matmul.tuned(), columns=64, blocks=4, slots=3, band=2)
HEADS = Heads(8, 8, 64, eps=stress_gpu.EPS)
CASES = {
    "gated": next(stress_gpu.gated([(256, 64, 64)], config=SMALL, **INTERPRET)),
    "norm": next(stress_gpu.norms([(5, 256, 0)], **INTERPRET)),
    "parts": list(stress_gpu.norms([(5, 256, 2)], **INTERPRET))[1],
    "rotation": list(stress_gpu.rotations([(5, HEADS)], **INTERPRET))[1],
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_right(name):
    error, same = stress_gpu.check_case(CASES[name], np.random.default_rng(0), rounds=2, repeats=1)
    assert error < stress_gpu.TOLERANCE and same


@pytest.mark.parametrize("wrong", ["a row", "rows that look at others", "nothing written"])
def test_what_is_wrong_is_found(wrong):
    case = CASES["norm"]

    def spoilt(x, update, weight):
        total, normed = case.truth(x, update, weight)
        if wrong == "a row":
            normed = normed.at[1].multiply(1.05)
        elif wrong == "rows that look at others":
            normed = normed + 0 * x[-1:]
        else:
            total = jnp.full_like(total, jnp.nan)
        return total, normed

    error, _ = stress_gpu.check_case(
        dataclasses.replace(case, kernel=spoilt), np.random.default_rng(0), rounds=2, repeats=1
    )
    assert not error < stress_gpu.TOLERANCE


def test_kernels_take_the_shapes_that_are_checked():
    """Abstractly: no input of these sizes is drawn."""
    for case in stress_gpu.DEVICE_CASES:
        inputs = jax.eval_shape(lambda case=case: case.inputs(_Zeros()))
        assert jax.tree.all(
            jax.tree.map(
                lambda one, other: (one.shape, other.dtype) == (other.shape, one.dtype),
                jax.eval_shape(case.kernel, *inputs),
                jax.eval_shape(case.truth, *inputs),
            )
        )


class _Zeros:
    """Draws nothing."""

    def standard_normal(self, shape, dtype):
        return jnp.zeros(shape, dtype)

    random = standard_normal

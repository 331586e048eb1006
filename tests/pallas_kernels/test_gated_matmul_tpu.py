"""The TPU kernel of the gated projection against float32, in interpret mode with race detection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_matmul import has_kernel, reference, tpu
from pallas_kernels.ragged_paged_attention.tpu_sizes import chips

INTERPRET = pltpu.InterpretParams(detect_races=True)
reference_of = jax.jit(reference.gated_matmul, static_argnames="activation")


def _inputs(rows: int, depth: int, columns: int):
    rng = np.random.default_rng(rows + depth)
    x = rng.standard_normal((rows, depth)).astype(jnp.bfloat16)
    weight = (rng.standard_normal((depth, 2 * columns)) * depth**-0.5).astype(jnp.bfloat16)
    return jnp.asarray(x), jnp.asarray(weight)


@pytest.mark.parametrize(
    ("activation", "rows", "depth", "columns", "sizes"),
    [
        ("silu", 512, 256, 384, tpu.Sizes(512, 128, 256)),  # rows stay, strips pass
        ("gelu_tanh", 512, 384, 256, tpu.Sizes(256, 256, 128)),  # blocks of rows; sums over parts of the depth
        ("silu", 512, 128, 512, tpu.Sizes(256, 128, 128, parts=2)),  # strips split between two cores
    ],
)
def test_kernel_against_float32(capfd, activation, rows, depth, columns, sizes):
    x, weight = _inputs(rows, depth, columns)
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=sizes.parts)
    got = tpu.gated_matmul(x, weight, activation=activation, sizes=sizes, interpret=interpret)
    wide = reference_of(*(np.asarray(each, np.float32) for each in (x, weight)), activation=activation)
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wide), rtol=1e-2, atol=1e-3)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_a_row_does_not_depend_on_the_others():
    x, weight = _inputs(512, 128, 128)
    sizes = tpu.Sizes(256, 128, 128)
    alone = tpu.gated_matmul(x, weight, activation="silu", sizes=sizes, interpret=INTERPRET)
    among = tpu.gated_matmul(x.at[300:].set(jnp.nan), weight, activation="silu", sizes=sizes, interpret=INTERPRET)
    np.testing.assert_array_equal(np.asarray(among[:300], np.float32), np.asarray(alone[:300], np.float32))
    assert jnp.isnan(among[300:]).all()


@pytest.mark.parametrize("chip", chips())
@pytest.mark.parametrize("rows", [256, 768, 2048, 8192])
@pytest.mark.parametrize(("depth", "columns"), [(4096, 14336), (4096, 3584), (8192, 1792), (1024, 3072), (2304, 9216)])
def test_sizes_divide_the_shapes_and_fit(chip, rows, depth, columns):
    """Blocks are as large as VMEM allows; where even the least does not fit, XLA's products are left."""
    room = chips()[chip].vmem_limit_bytes
    sizes = tpu.sizes_for(rows, depth, columns, 2, chips()[chip])
    if sizes is None:
        assert tpu.Sizes(tpu.TILE_ROWS, 128, 128).vmem(depth, 2) > room
        return
    assert rows % sizes.rows == 0 and sizes.rows % tpu.TILE_ROWS == 0 and depth % sizes.depth == 0
    assert columns % (sizes.columns * sizes.parts) == 0
    assert sizes.vmem(depth, 2) <= room
    moved = tpu.traffic(rows, depth, columns, 2, chip)
    assert moved is not None
    assert moved.read == (rows // sizes.rows * depth * 2 * columns + (sizes.parts - 1) * rows * depth) * 2
    assert moved.flops == 4 * rows * depth * columns


def test_what_the_kernel_lacks_is_left_to_xla_or_refused():
    x, weight = _inputs(512, 128, 128)
    assert has_kernel(x, weight, "silu", "tpu")
    assert not has_kernel(x, weight, "gelu", "tpu") and not has_kernel(x[:200], weight, "silu", "tpu")
    assert not has_kernel(x.astype(jnp.float32), weight.astype(jnp.float32), "silu", "tpu")
    with pytest.raises(ValueError, match="a multiple of 256"):
        tpu.gated_matmul(x[:300], weight, activation="silu")

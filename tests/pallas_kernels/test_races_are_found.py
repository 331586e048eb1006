"""The interpreter says of a kernel with a race that it has one, in the words that `no_races` looks for."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def test_two_warpgroups_that_write_the_same(capfd):
    def body(x, out, scratch):
        scratch[...] = x[...]
        out[...] = scratch[...]

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types=[plgpu.SMEM((128,), jnp.float32)],
        num_threads=2,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    run(jnp.ones(128)).block_until_ready()
    assert "RACE DETECTED" in capfd.readouterr().out

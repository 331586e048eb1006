"""The interpreters say of a kernel with a race that it has one, in the words that `no_races` looks for."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu


def has_race(run, capfd) -> bool:
    """JAX 0.11 says it and goes on; from 0.12 on it raises."""
    try:
        run().block_until_ready()
        said = ""
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
    return "RACE DETECTED" in capfd.readouterr().out + said


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
    assert has_race(lambda: run(jnp.ones(128)), capfd)


@pytest.mark.parametrize("awaited", [True, False])
def test_a_copy_that_is_read_too_early_on_a_tpu(capfd, awaited):
    """And nothing of the same kernel that waits."""

    def body(x, out, scratch, semaphore):
        copy = pltpu.make_async_copy(x, scratch, semaphore)
        copy.start()
        if awaited:
            copy.wait()
        out[...] = scratch[...]
        if not awaited:
            copy.wait()

    run = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    assert has_race(lambda: run(jnp.ones((8, 128))), capfd) == (not awaited)


def test_two_cores_that_write_the_same_on_a_tpu(capfd):
    def body(x, out):
        out[...] = x[...]

    whole = pl.BlockSpec((8, 128), lambda core: (0, 0))
    run = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        grid=(2,),
        in_specs=[whole],
        out_specs=whole,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2),
    )
    assert has_race(lambda: run(jnp.ones((8, 128))), capfd)

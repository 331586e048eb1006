"""The sum over shards with the norm behind it: the reference against float32, and the GPU kernel as far as it goes
where there are no GPUs. The interpreter knows no semaphores: `stress_gpu.py` beside the kernel runs it on GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.all_reduce_rms_norm import all_reduce_rms_norm, gpu, has_kernel

OPTIONS = dict(axis="tensor", eps=1e-5)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shards", "rows"), [(1, 3), (2, 8), (3, 7), (4, 2), (8, 5)])
def test_reference_against_float32(shards, rows, dtype, unit_offset, rng):
    own, width = -(-rows // shards), 64
    stream = rng.standard_normal((shards * own, width))
    updates, weight = rng.standard_normal((shards, rows, width)), rng.standard_normal(width)
    stream, updates, weight = (jnp.asarray(x, dtype) for x in (stream, updates, weight))
    run = functools.partial(all_reduce_rms_norm, **OPTIONS, unit_offset=unit_offset, backend="reference")
    made, normed = jax.vmap(lambda x, u: run(x, u, weight), axis_name="tensor")(
        stream.reshape(shards, own, width), updates
    )
    assert made.dtype == normed.dtype == stream.dtype and made.shape == (shards, own, width)
    total = np.asarray(stream[:rows], np.float32) + np.asarray(updates, np.float32).sum(0)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == "float32" else dict(rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(np.asarray(made, np.float32).reshape(-1, width)[:rows], total, **tolerance)
    scale = np.asarray(weight, np.float32) + (1.0 if unit_offset else 0.0)
    expected = total / np.sqrt((total**2).mean(axis=1, keepdims=True) + 1e-5) * scale
    for shard in np.asarray(normed, np.float32):
        np.testing.assert_allclose(shard, expected, **{**tolerance, "atol": 2 * tolerance["atol"]})


@pytest.mark.parametrize(
    ("data", "shards", "rows", "width"), [(1, 2, 2, 256), (1, 4, 3, 8192), (1, 8, 256, 2304), (2, 2, 64, 5120)]
)
def test_the_kernel_lowers(data, shards, rows, width):
    """For GPUs that are not there: rows of all sizes that it takes, more shards than rows, ranks beside each other."""
    mesh = AbstractMesh((data, 1, shards), ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)
    both = P(("data", "tensor"))
    run = jax.shard_map(
        functools.partial(all_reduce_rms_norm, **OPTIONS, backend="gpu"),
        mesh=mesh,
        in_specs=(both, both, P()),
        out_specs=(both, both),
        check_vma=False,
    )
    copies, own = data * shards, -(-rows // shards)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((copies * own, width), (copies * rows, width), (width,))
    ]
    check = export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    exported = export.export(jax.jit(run), platforms=("cuda",), disabled_checks=[check])(*arguments)
    assert [x.shape for x in exported.out_avals] == [x.shape for x in arguments[:2]]
    text = exported.mlir_module()
    assert text.count("custom_call @mosaic_gpu_v2") == 1 and "all_reduce" not in text.replace("all_reduce_rms_norm", "")


@pytest.mark.parametrize(
    ("width", "dtype", "devices", "fits"),
    [
        (8192, "bfloat16", 2, True),
        (8192, "bfloat16", 8, True),
        (16384, "bfloat16", 8, False),  # ten rows of 32 KiB
        (576, "bfloat16", 3, False),
        (4096, "float32", 2, False),
    ],
)
def test_what_the_kernel_takes(width, dtype, devices, fits):
    assert has_kernel(width, dtype, devices, "gpu") == fits and has_kernel(width, dtype, devices, "reference")
    slots = gpu._slots(width, devices)
    assert not fits or (1 <= slots <= 4 and (devices + 2) * slots * width * 2 <= gpu.SMEM)


def _over_two(stream: jax.Array, updates: jax.Array, weight: jax.Array, backend: str):
    run = functools.partial(all_reduce_rms_norm, **OPTIONS, backend=backend)
    return jax.vmap(lambda x, u: run(x, u, weight), axis_name="tensor")(stream, updates)


def test_what_does_not_fit_is_refused():
    def ones(*shape, dtype=jnp.bfloat16):
        return jnp.ones(shape, dtype)

    with pytest.raises(ValueError, match=r"x \(4, 64\) bfloat16 its 2 rows"):
        _over_two(ones(2, 4, 64), ones(2, 4, 64), ones(64), "reference")
    with pytest.raises(ValueError, match=r"weight \(32,\)"):
        _over_two(ones(2, 2, 64), ones(2, 4, 64), ones(32), "reference")
    with pytest.raises(ValueError, match="float32 must be"):
        _over_two(ones(2, 2, 64), ones(2, 4, 64, dtype=jnp.float32), ones(64), "reference")
    with pytest.raises(ValueError, match="'tpu' is unknown"):
        _over_two(ones(2, 2, 64), ones(2, 4, 64), ones(64), "tpu")
    with pytest.raises(ValueError, match="rows of 576 bfloat16 over 2 devices are not supported on GPU"):
        _over_two(ones(2, 2, 576), ones(2, 4, 576), ones(576), "gpu")

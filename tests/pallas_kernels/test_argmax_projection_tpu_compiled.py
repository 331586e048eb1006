"""The projection to a row's largest entry compiled by libtpu for chips that are not there: it fits, and the weight is
not copied."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.argmax_projection import tpu
from pallas_kernels.ragged_paged_attention import tpu_sizes
from tests.tpu_topology import TOPOLOGIES, abstract, compiling_for, kernel_vmem, makers_of

LLAMA, QWEN = (4096, 128_256), (1024, 151_936)  # hidden size and vocabulary
SHARD = (8192, 8016)  # Llama 3.3 70B's over 16 shards: no whole lanes


def compile_for(chip: str, rows: int, depth: int, columns: int, by_columns: bool) -> None:
    """None where it does not fit by its own estimate."""
    with compiling_for(chip, (1,), ("x",)) as mesh:
        array = functools.partial(abstract, mesh)
        shape = (columns, depth) if by_columns else (depth, columns)
        x, weight = array((rows, depth), jnp.bfloat16), array(shape, jnp.bfloat16)
        if not tpu.supports(x, weight, by_columns=by_columns):
            least = tpu._vmem(rows, depth, tpu.LANES, 2)
            assert least > tpu_sizes.chips()[chip].vmem_limit_bytes
            return
        run = jax.jit(functools.partial(tpu.argmax_projection, by_columns=by_columns))
        text = run.lower(x, weight, array((), jnp.int32)).compile().as_text()
    assert not makers_of(text, shape) and not makers_of(text, shape[::-1])
    assert max(kernel_vmem(text).values()) <= tpu_sizes.chips()[chip].vmem_limit_bytes


@pytest.mark.parametrize("shape", [(128, *LLAMA, False), (256, *QWEN, True)], ids=str)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_published_models(chip, shape):
    compile_for(chip, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("size", [(896, 151_936), (2304, 256_000), LLAMA, SHARD, (8192, 128_256)], ids=str)
@pytest.mark.parametrize("rows", [64, 80, 192, 512, 1024])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_what_it_says_it_takes_compiles(chip, rows, size, by_columns):
    compile_for(chip, rows, *size, by_columns)

"""The TPU kernels compiled by libtpu for chips that are not there: they fit, and no cache is copied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import AttentionMetadata, CacheSpec, tpu, tpu_sizes
from tests.tpu_topology import TOPOLOGIES, abstract, compiling_for, kernel_vmem, makers_of

LLAMA = dict(num_heads=32, num_kv_heads=8, head_dim=128)  # Llama 3.1 8B
BATCHES = {"decode": dict(tokens=256, decodes_only=True), "prefill": dict(tokens=2048), "mixed": dict(tokens=512)}


def compile_for(
    chip: str,
    *,
    tokens: int,
    rows: int = 256,
    width: int = 2048,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int = 64,
    num_pages: int = 4000,
    dtype=jnp.bfloat16,
    cache_dtype=None,
    decodes_only: bool = False,
    sinks: bool = False,
    **options,
) -> dict[str, int]:
    """Compiles one call with a donated cache, asserts that no cache is copied, and returns VMEM by kernel."""
    with compiling_for(chip, (1,), ("x",)) as mesh:
        array = functools.partial(abstract, mesh)
        int32 = functools.partial(array, dtype=jnp.int32)
        metadata = AttentionMetadata(
            *(int32(shape) for shape in ((tokens,), (tokens,), (rows + 1,), (rows,), (rows, width), (tokens,), (), ())),
            decodes_only=decodes_only,
        )
        cache_dtype = jnp.dtype(cache_dtype or dtype)
        spec = tpu.cache_shape(CacheSpec(num_pages, page_size, num_kv_heads, head_dim, cache_dtype))
        q, k = array((tokens, num_heads, head_dim), dtype), array((tokens, num_kv_heads, head_dim), dtype)
        arrays = {"sinks": array((num_heads,), jnp.float32)} if sinks else {}
        attend = jax.jit(
            functools.partial(tpu.ragged_paged_attention, scale=head_dim**-0.5, **options), donate_argnums=3
        )
        compiled = attend.lower(q, k, k, array(spec.shape, cache_dtype), metadata, **arrays).compile()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert not makers_of(hlo, spec.shape)
    assert memory.alias_size_in_bytes >= np.prod(spec.shape) * cache_dtype.itemsize
    taken = kernel_vmem(hlo)
    longer = set() if decodes_only else {"ragged_paged_write", "ragged_paged_prefill"}
    assert taken.keys() == {"ragged_paged_decode"} | longer
    return taken


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_llama(chip, batch):
    taken = compile_for(chip, **BATCHES[batch], **LLAMA)
    megabytes = {name.removeprefix("ragged_paged_"): round(size / 1e6, 1) for name, size in taken.items()}
    print(f"\n{chip}, {batch}: {megabytes}")  # for docs/tpu.md
    assert max(taken.values()) <= tpu_sizes.chips()[chip].vmem_limit_bytes
    wanted = tpu_sizes.Problem(BATCHES[batch]["tokens"], 8, 4, 64, 2048, 128, 256, 2, 2)
    device = tpu_sizes.chips()[chip]
    estimate = tpu_sizes.decode_vmem(wanted, tpu_sizes.decode_sizes(device, wanted))
    assert taken["ragged_paged_decode"] <= estimate
    if batch != "decode":
        assert taken["ragged_paged_prefill"] <= tpu_sizes.prefill_vmem(wanted, tpu_sizes.prefill_sizes(device, wanted))


SINKS = dict(tokens=2048, num_heads=64, num_kv_heads=8, head_dim=64, window=128, sinks=True)  # gpt-oss
OPTIONS = [  # in a plain run, too
    ("v5p", dict(tokens=2048, num_heads=8, num_kv_heads=4, head_dim=256, page_size=128, window=4096, cap=50.0)),
    ("tpu7x", SINKS),
    ("v6e", SINKS),
]
SHAPES = [
    *((chip, SINKS) for chip in ("v4", "v5e", "v5p")),
    ("v5e", dict(tokens=192, num_heads=9, num_kv_heads=3, head_dim=64, page_size=16)),  # SmolLM2 135M
    ("v6e", dict(tokens=256, num_heads=14, num_kv_heads=2, head_dim=64)),  # Qwen2.5 0.5B
    ("v4", dict(tokens=512, num_heads=32, num_kv_heads=32, head_dim=96, page_size=32, width=128)),  # Phi-3 mini
    ("v4", dict(tokens=2048, num_heads=71, num_kv_heads=1, head_dim=64, page_size=128)),  # Falcon 7B
    ("v5e", dict(tokens=8192, num_heads=128, num_kv_heads=8, head_dim=128)),  # Llama 3.1 405B
    ("v6e", dict(tokens=8, rows=8, num_heads=1, num_kv_heads=1, head_dim=64, num_pages=20)),
    ("tpu7x", dict(tokens=33, rows=8, num_heads=5, num_kv_heads=5, head_dim=128, page_size=16, width=32768)),
    ("v6e", dict(tokens=64, num_heads=4, num_kv_heads=2, head_dim=64, dtype=jnp.float32, num_pages=200)),
    ("v4", dict(tokens=256, decodes_only=True, num_heads=4, num_kv_heads=2, head_dim=64, dtype=jnp.float32)),
    *(
        (chip, dict(tokens=tokens, num_heads=8, num_kv_heads=4, head_dim=256, window=4096, cap=50.0))  # Gemma 2 2B
        for chip in ("v4", "v5e", "v6e", "tpu7x")
        for tokens in (64, 2048)
    ),
]


@pytest.mark.parametrize("chip,case", [*OPTIONS, *(pytest.param(*shape, marks=pytest.mark.slow) for shape in SHAPES)])
def test_other_shapes(chip, case):
    """Odd groups, every head_dim and page size, wide page tables, float32; small caches, which XLA would like to hold
    in VMEM."""
    taken = compile_for(chip, **case)
    assert max(taken.values()) <= tpu_sizes.chips()[chip].vmem_limit_bytes


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_caches_of_eight_bits(chip, cache_dtype):
    compile_for(chip, **BATCHES["mixed"], **LLAMA, page_size=32, cache_dtype=cache_dtype)

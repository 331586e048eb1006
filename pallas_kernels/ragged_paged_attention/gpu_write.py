"""Writes a step's new keys and values into their pages, in place: TMA in, one TMA out a token and part."""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .types import AttentionMetadata

MAX_BLOCKS = 264


def _write_body(slots_ref, count_ref, k_ref, v_ref, cache_ref, k_smem, v_smem, ready, *, chunk: int, chunks: int):
    block = lax.axis_index("block")
    page_size = cache_ref.shape[3]

    @pl.loop(block, chunks, step=MAX_BLOCKS)
    def _chunk(index):
        tokens = pl.ds(index * chunk, chunk)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(k_ref.at[tokens], k_smem, ready)
        plgpu.copy_gmem_to_smem(v_ref.at[tokens], v_smem, ready)
        places = [slots_ref[index * chunk + i] for i in range(chunk)]
        plgpu.barrier_wait(ready)
        for i, slot in enumerate(places):

            @pl.when(index * chunk + i < count_ref[0])
            def _():
                page, offset = lax.div(slot, page_size), lax.rem(slot, page_size)
                plgpu.copy_smem_to_gmem(k_smem.at[i], cache_ref.at[page, 0, :, offset])
                plgpu.copy_smem_to_gmem(v_smem.at[i], cache_ref.at[page, 1, :, offset])

    plgpu.wait_smem_to_gmem(0)


def write(cache: jax.Array, k: jax.Array, v: jax.Array, metadata: AttentionMetadata, *, interpret=False) -> jax.Array:
    """Returns `cache` with the new keys and values; XLA updates it in place where it is donated.

    Args:
      cache: [num_pages, 2, num_kv_heads, page_size, head_dim].
      k, v: [T, num_kv_heads, head_dim] in the cache's dtype.
      metadata: says where; padding tokens are not written at all.
    """
    tokens = k.shape[0]
    # Few tokens: one a block, for latency. Many: several a block, to keep copies in flight.
    chunk = next(c for c in (8, 4, 2, 1) if tokens % c == 0 and (tokens // c >= MAX_BLOCKS or c == 1))
    chunks = tokens // chunk
    count = metadata.query_starts[metadata.num_rows][None]
    cache_ref = jax.new_ref(cache)

    def body(*refs):
        _write_body(*refs, chunk=chunk, chunks=chunks)

    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=(
            plgpu.SMEM((chunk, *k.shape[1:]), cache.dtype),
            plgpu.SMEM((chunk, *k.shape[1:]), cache.dtype),
            plgpu.Barrier(num_arrivals=2),
        ),
        grid=(min(chunks, MAX_BLOCKS),),
        grid_names=("block",),
        interpret=interpret,
        kernel_name="ragged_paged_write",
    )(metadata.write_slots, count, k, v, cache_ref)
    return jax.freeze(cache_ref)

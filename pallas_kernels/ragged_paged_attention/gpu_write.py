"""Writes a step's new keys and values into their pages, in place: TMA in, one TMA out a token and part."""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .types import AttentionMetadata

MAX_BLOCKS = 264
MAX_STAGE_BYTES = 65536  # of shared memory a block, so that a multiprocessor holds several


def _write_body(slots_ref, count_ref, qkv_ref, cache_ref, stage, ready, *, num_heads: int, chunk: int, chunks: int):
    block = lax.axis_index("block")
    num_kv_heads, page_size = cache_ref.shape[2:4]
    new_heads = pl.ds(num_heads, 2 * num_kv_heads)

    @pl.loop(block, chunks, step=MAX_BLOCKS)
    def _chunk(index):
        tokens = pl.ds(index * chunk, chunk)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(qkv_ref.at[tokens, new_heads], stage, ready)
        places = [slots_ref[index * chunk + i] for i in range(chunk)]
        plgpu.barrier_wait(ready)
        for i, slot in enumerate(places):

            @pl.when(index * chunk + i < count_ref[0])
            def _():
                page, offset = lax.div(slot, page_size), lax.rem(slot, page_size)
                for part in range(2):
                    source = stage.at[i, pl.ds(part * num_kv_heads, num_kv_heads)]
                    plgpu.copy_smem_to_gmem(source, cache_ref.at[page, part, :, offset])

    plgpu.wait_smem_to_gmem(0)


def write(
    cache: jax.Array, qkv: jax.Array, num_heads: int, metadata: AttentionMetadata, *, interpret=False
) -> jax.Array:
    """Returns `cache` with the new keys and values; XLA updates it in place where it is donated.

    Args:
      cache: [num_pages, 2, num_kv_heads, page_size, head_dim].
      qkv: [at least T, at least num_heads + 2 * num_kv_heads, head_dim] in the cache's dtype, queries, keys, values.
      metadata: says where; padding tokens are not written at all.
    """
    tokens, num_kv_heads, head_dim = metadata.write_slots.shape[0], cache.shape[2], cache.shape[4]
    # Few tokens: one a block, for latency. Many: several a block, to keep copies in flight.
    row_bytes = 2 * num_kv_heads * head_dim * cache.dtype.itemsize

    def fits(size: int) -> bool:
        return tokens % size == 0 and tokens // size >= MAX_BLOCKS and size * row_bytes <= MAX_STAGE_BYTES

    chunk = next((size for size in (8, 4, 2) if fits(size)), 1)
    chunks = tokens // chunk
    count = metadata.query_starts[metadata.num_rows][None]
    cache_ref = jax.new_ref(cache)

    def body(*refs):
        _write_body(*refs, num_heads=num_heads, chunk=chunk, chunks=chunks)

    plgpu.kernel(
        body,
        out_type=(),
        scratch_types=(
            plgpu.SMEM((chunk, 2 * num_kv_heads, head_dim), cache.dtype),
            plgpu.Barrier(),
        ),
        grid=(min(chunks, MAX_BLOCKS),),
        grid_names=("block",),
        interpret=interpret,
        kernel_name="ragged_paged_write",
    )(metadata.write_slots, count, qkv, cache_ref)
    return jax.freeze(cache_ref)

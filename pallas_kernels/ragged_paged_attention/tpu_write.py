"""Writes the new keys and values of the rows of several tokens into their pages, in place, by Pallas' own pipeline.

A tile of the cache holds 8 to 32 positions, and a row's tokens stand at any offset to them. So a grid step takes one
aligned run of positions within a page: it reads the two blocks of new tokens that the run overlaps, shifts them into
place in float32 (which is exact), keeps the run's old content where nothing is new, and writes the run. Old content is
read only for runs that are partly new, at a row's two ends.

Bytes: the new keys and values are written once. They are read once for rows whose tokens stand at the same offset to
such runs as their positions do, a prompt alone in its step for one, and twice for others.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tpu_common import keep_in_hbm
from .tpu_plan import writes
from .tpu_sizes import Chip, vmem_limit, write_vmem
from .types import AttentionMetadata

MOST_TOKENS = 64  # of a run


def _body(pages, parts, old_pages, old_parts, sources, shifts, firsts, lasts, low, high, old, out):
    step = pl.program_id(1)
    size = old.shape[1]
    both = jnp.concatenate([low[...].astype(jnp.float32), high[...].astype(jnp.float32)], axis=1)
    new = pltpu.roll(both, lax.rem(2 * size - shifts[step], 2 * size), axis=1)[:, :size]
    at = lax.broadcasted_iota(jnp.int32, new.shape, 1)
    is_new = (at >= firsts[step]) & (at < lasts[step])
    out[...] = jnp.where(is_new, new, old[...].astype(jnp.float32)).astype(out.dtype)


def write(
    cache: jax.Array, new: jax.Array, metadata: AttentionMetadata, *, parts: int, chip: Chip, interpret
) -> jax.Array:
    """Returns `cache` with the new keys and values of the rows from num_decodes on; updated in place where donated.

    Args:
      cache: [num_pages, num_kv_heads, page_size, lanes].
      new: [num_kv_heads, T, lanes] in the cache's dtype.
      parts: what the heads are split into, for the cores of a device.
    """
    _, num_heads, page_size, lanes = cache.shape
    size = min(page_size, MOST_TOKENS)
    heads = num_heads // parts
    needed = write_vmem(heads, size, lanes, cache.dtype.itemsize)
    pad = -new.shape[1] % size
    new = jnp.pad(new, ((0, 0), (0, pad), (0, 0)))
    blocks = new.shape[1] // size
    plan = writes(metadata, size, page_size)

    def source(offset):
        def index(part, step, pages, parts, old_pages, old_parts, sources, shifts, *_):
            block = jnp.clip(sources[step] + offset, 0, blocks - 1)
            # Runs that are whole blocks need no second one: it stays what it is, so that nothing is fetched.
            return part, jnp.where(shifts[step] == 0, 0, block) if offset else block, 0

        return pl.BlockSpec((heads, size, lanes), index)

    def old_run(part, step, pages, parts, old_pages, old_parts, *_):
        return old_pages[step], part, old_parts[step], 0

    def run(part, step, pages, parts, *_):
        return pages[step], part, parts[step], 0

    *scalars, count = plan
    return pl.pallas_call(
        _body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(parts, jnp.maximum(count[0], 1)),  # a step with nothing to do rewrites the dummy page
            in_specs=[source(0), source(1), pl.BlockSpec((None, heads, size, lanes), old_run)],
            out_specs=pl.BlockSpec((None, heads, size, lanes), run),
        ),
        out_shape=pltpu.HBM(cache.shape, cache.dtype),
        input_output_aliases={len(scalars) + 2: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit(chip, needed)
        ),
        interpret=interpret,
        name="ragged_paged_write",
    )(*scalars, new, new, keep_in_hbm(cache, interpret))

"""Ragged paged attention on TPU, in Mosaic TPU (Pallas).

Three kernels: `tpu_write` puts the new keys and values of longer rows into their pages, in place; `tpu_decode` serves
the leading rows of one query token, their writes included; `tpu_prefill` serves all other rows. The first and the last
are left out of steps that are known to hold decodes alone.

A page that a row writes to is that row's alone in the step: decode reads others' pages while it writes 1 to 4 tokens,
of which only one is new. Behind a row's end a page holds anything: it meets no product before it is written.

A page holds, for each key-value head, page_size rows of one key and one value side by side: a head's keys and values
are whole tiles that a product takes as they are, and a page is one contiguous copy. Heads of 64 fill the 128 lanes
together; their queries are padded with zeros where the values stand, and the sum of values comes out in the upper half.
"""

import jax
import jax.numpy as jnp

from . import tpu_decode, tpu_prefill, tpu_sizes, tpu_write
from .tpu_sizes import LANES
from .types import AttentionMetadata, CacheSpec

PAGE_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 128, 256)
DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float32)))
CACHE_DTYPES = (*DTYPES, *map(jnp.dtype, (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8)))


def padded_head_dim(head_dim: int) -> int:
    """The head_dim that the cache stores: a head_dim between the supported ones (96) is padded with zeros."""
    for supported in HEAD_DIMS:
        if head_dim <= supported:
            return supported
    raise ValueError(f"head_dim {head_dim} is not supported on TPU; the most is {HEAD_DIMS[-1]}")


def cache_shape(spec: CacheSpec) -> jax.ShapeDtypeStruct:
    """[num_pages, num_kv_heads, page_size, 2 * head_dim padded to 64, 128 or 256], keys before values.

    Raises:
      ValueError: a page size, head_dim or dtype that the kernels lack.
    """
    if spec.page_size not in PAGE_SIZES:
        raise ValueError(f"page_size {spec.page_size} is not supported on TPU; choose one of {PAGE_SIZES}")
    dtype = jnp.dtype(spec.dtype)
    if dtype not in CACHE_DTYPES:
        known = ", ".join(known.name for known in CACHE_DTYPES)
        raise ValueError(f"a cache of {dtype.name} is not supported on TPU; only {known} are")
    if spec.page_size < 32 // dtype.itemsize:
        raise ValueError(
            f"page_size {spec.page_size} is not supported on TPU with a cache of {dtype.name}; "
            f"the least is {32 // dtype.itemsize}"
        )
    lanes = 2 * padded_head_dim(spec.head_dim)
    return jax.ShapeDtypeStruct((spec.num_pages, spec.num_kv_heads, spec.page_size, lanes), spec.dtype)


def _pad_lanes(x: jax.Array, lanes: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, lanes - x.shape[2])))


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    chip: str | None = None,
    decode_sizes: tpu_sizes.DecodeSizes | None = None,
    prefill_sizes: tpu_sizes.PrefillSizes | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.ragged_paged_attention`. Three differences: products are in q's dtype with float32 sums, whatever the
    cache holds; padding tokens are not written to the dummy page; and behind a row's end its page may change, up to 31
    tokens. So a row's next step begins at that end or before it, and what stands there in the page is nobody else's.

    Args:
      chip: a name in tpu_tuned.json; None takes the abstract mesh's chip.
      decode_sizes, prefill_sizes: block sizes; None takes the chip's.
      interpret: False, or `pltpu.InterpretParams` to run on the CPU.

    Raises:
      ValueError: dtypes that differ or are not supported, page tables too wide for SMEM, or what `cache_shape` refuses.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size, cache_lanes = k.shape[1], cache.shape[2], cache.shape[-1]
    spec = CacheSpec(cache.shape[0], page_size, num_kv_heads, head_dim, cache.dtype)
    if cache.shape != cache_shape(spec).shape:
        raise ValueError(f"cache {cache.shape} is not {cache_shape(spec).shape}, as `cache_shape` says")
    if q.dtype not in DTYPES:
        raise ValueError(f"queries of {q.dtype.name} are not supported on TPU; only bfloat16 and float32 are")
    wide = cache_lanes // 2
    lanes = max(wide, LANES)
    device = tpu_sizes.chip_of(chip)
    problem = tpu_sizes.Problem(
        num_tokens,
        num_kv_heads,
        num_heads // num_kv_heads,
        page_size,
        metadata.page_tables.shape[1],
        lanes,
        cache_lanes,
        q.dtype.itemsize,
        cache.dtype.itemsize,
    )
    factor = jnp.float32(scale) if k_scale is None else jnp.float32(scale) * k_scale
    k = k if k_scale is None else k / k_scale
    v = v if v_scale is None else v / v_scale
    new = jnp.concatenate([_pad_lanes(k, wide), _pad_lanes(v, wide)], axis=2).astype(cache.dtype)
    q = _pad_lanes(q, lanes)
    options = {"window": window, "cap": cap, "sinks": sinks, "interpret": interpret, "stay_bytes": device.stay_bytes}
    decode_sizes = decode_sizes or tpu_sizes.decode_sizes(device, problem)
    prefill_sizes = prefill_sizes or tpu_sizes.prefill_sizes(device, problem)
    decode_limit = tpu_sizes.vmem_limit(device, tpu_sizes.decode_vmem(problem, decode_sizes))
    prefill_needs = tpu_sizes.prefill_vmem(problem, prefill_sizes, stay_bytes=device.stay_bytes)
    prefill_limit = tpu_sizes.vmem_limit(device, prefill_needs)

    # Heads first, as the kernels take them.
    q, new = q.transpose(1, 0, 2), new.transpose(1, 0, 2)
    num_rows = min(num_tokens, metadata.kv_lens.shape[0])  # decode rows stand first: row r's query is token r
    decodes_only = metadata.decodes_only or num_tokens == 1
    if not decodes_only:
        cache = tpu_write.write(
            cache,
            new,
            metadata,
            parts=decode_sizes.parts,
            chip=device,
            interpret=interpret,
        )
    out, cache = tpu_decode.decode(
        q,
        new,
        cache,
        metadata,
        factor.reshape(1),
        sizes=decode_sizes,
        vmem_limit_bytes=decode_limit,
        **options,
    )
    token = jnp.arange(num_tokens)[:, None]
    if decodes_only:
        out = jnp.where(token < metadata.num_decodes, out, 0)
    else:
        longer = tpu_prefill.prefill(
            q,
            cache,
            metadata,
            factor.reshape(1),
            sizes=prefill_sizes,
            vmem_limit_bytes=prefill_limit,
            **options,
        )
        longer = jnp.where(token < metadata.query_starts[metadata.num_rows], longer, 0)
        out = jnp.pad(out, ((0, num_tokens - num_rows), (0, 0)))
        out = jnp.where(token < metadata.num_decodes, out, longer)
    out = out.reshape(num_tokens, num_heads, lanes)[:, :, lanes - wide : lanes - wide + head_dim]
    if v_scale is not None:
        out = (out * v_scale).astype(q.dtype)
    return out, cache

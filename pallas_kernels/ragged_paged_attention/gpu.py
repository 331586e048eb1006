"""Ragged paged attention on Hopper GPUs, in Mosaic GPU (Pallas): TMA page gathers, wgmma, warp specialization.

A batch of decodes only takes two kernels: `gpu_decode`, split over the keys, which also puts the new keys and values
into their pages; and `gpu_merge`, which joins what decode split and zeroes the padding. Any other batch takes four:
`gpu_write` puts the new keys and values into their pages, in place; decode and merge serve the leading rows of one
query token; `gpu_prefill` serves all other rows and zeroes the padding. Decodes whose groups of query heads are split
(`split_group`) take three: a new key must be written before several groups read its page, so `gpu_write` goes first.
"""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from . import gpu_decode, gpu_merge, gpu_prefetch, gpu_prefill, gpu_write
from .types import AttentionMetadata, CacheSpec

PAGE_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 128, 256)
MAX_GROUP = 48  # query heads that decode has shared memory for, at every head_dim


@functools.cache
def _table() -> dict:
    return json.loads((Path(__file__).parent / "gpu_tuned.json").read_text())


def tuned_decode(head_dim: int) -> gpu_decode.DecodeConfig:
    """Sizes for head_dim 64, 128 or 256; only those for 128 were chosen by timing."""
    return gpu_decode.DecodeConfig(**_table()["decode"][str(head_dim)])


def tuned_prefill(head_dim: int, group: int, num_tokens: int) -> gpu_prefill.PrefillConfig:
    """Few tokens: the heads of a group share a row tile, so that short rows fill it. Many: one head a tile."""
    pack = 1
    if num_tokens < _table()["pack_below_tokens"]:
        pack = next(pack for pack in (8, 4, 2, 1) if group % pack == 0)
    return gpu_prefill.PrefillConfig(**_table()["prefill"][str(head_dim)], pack=pack)


def split_group(group: int) -> tuple[int, int]:
    """(splits, size): decode serves a key-value head's query heads in so many groups of equal size, at most MAX_GROUP.

    Each group reads the key-value head's keys by itself. Heads of zeros fill the last where the size does not divide.
    """
    splits = -(-group // MAX_GROUP)
    return splits, -(-group // splits)


def lacks(spec: CacheSpec) -> str | None:
    """What keeps the kernels from these layers of a model, whatever the options; None: nothing."""
    if jnp.dtype(spec.dtype) != jnp.bfloat16:
        return f"a cache of {jnp.dtype(spec.dtype).name}, not bfloat16"
    if spec.head_dim > HEAD_DIMS[-1]:
        return f"head_dim {spec.head_dim}, above {HEAD_DIMS[-1]}"
    return None


def cache_shape(spec: CacheSpec) -> jax.ShapeDtypeStruct:
    """[num_pages, 2 (key, value), num_kv_heads, page_size, head_dim padded to 64, 128 or 256].

    Raises:
      ValueError: a page size, head_dim or dtype that the kernels lack.
    """
    if spec.page_size not in PAGE_SIZES:
        raise ValueError(f"page_size {spec.page_size} is not supported on GPU; choose one of {PAGE_SIZES}")
    if jnp.dtype(spec.dtype) != jnp.bfloat16:
        raise ValueError(f"a cache of {jnp.dtype(spec.dtype).name} is not supported on GPU; only bfloat16 is")
    head_dim = padded_head_dim(spec.head_dim)
    return jax.ShapeDtypeStruct((spec.num_pages, 2, spec.num_kv_heads, spec.page_size, head_dim), spec.dtype)


def padded_head_dim(head_dim: int) -> int:
    """The head_dim that the cache stores: a head_dim between the supported ones (96) is padded with zeros."""
    for supported in HEAD_DIMS:
        if head_dim <= supported:
            return supported
    raise ValueError(f"head_dim {head_dim} is not supported on GPU; the most is {HEAD_DIMS[-1]}")


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
    then: jax.Array | None = None,
    decode_config: gpu_decode.DecodeConfig | None = None,
    prefill_config: gpu_prefill.PrefillConfig | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.ragged_paged_attention`. Two differences: all computation is in bfloat16 with float32 sums, and padding
    tokens are not written to the dummy page.

    Args:
      decode_config, prefill_config: tile sizes; None takes the tuned ones.
      interpret: False, or `plgpu.InterpretGPUParams` to run on the CPU.

    Raises:
      ValueError: a dtype other than bfloat16, or what `cache_shape` refuses.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = cache.shape[2:4]
    group = num_heads // num_kv_heads
    spec = CacheSpec(cache.shape[0], page_size, num_kv_heads, head_dim, cache.dtype)
    if cache.shape != cache_shape(spec).shape:
        raise ValueError(f"cache {cache.shape} is not {cache_shape(spec).shape}, as `cache_shape` says")
    if q.dtype != jnp.bfloat16:
        raise ValueError(f"queries of {q.dtype.name} are not supported on GPU; only bfloat16 is")
    if k_scale is not None:
        k = k / k_scale
    if v_scale is not None:
        v = v / v_scale
    k, v = k.astype(cache.dtype), v.astype(cache.dtype)
    scales = jnp.stack(
        [
            jnp.float32(scale) * (1.0 if k_scale is None else jnp.float32(k_scale)),
            jnp.float32(1.0) if v_scale is None else jnp.float32(v_scale),
        ]
    )
    splits, size = split_group(group)
    idle = splits * size - group  # heads of zeros that a key-value head gets besides
    decode_config = decode_config or tuned_decode(cache.shape[4])
    prefill_config = prefill_config or tuned_prefill(cache.shape[4], group + idle, num_tokens)
    if pad := cache.shape[4] - head_dim:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad))) for x in (q, k, v))
    if idle:
        q = jnp.pad(q.reshape(num_tokens, num_kv_heads, group, -1), ((0, 0), (0, 0), (0, idle), (0, 0)))
        q = q.reshape(num_tokens, num_kv_heads * (group + idle), -1)
        if sinks is not None:
            sinks = jnp.pad(sinks.reshape(num_kv_heads, group), ((0, 0), (0, idle))).reshape(-1)
    all_heads = q.shape[1]  # with those of zeros
    # One array, so that XLA writes it in one kernel, the rotation of queries and keys included.
    # A group's queries are copied in tiles of as many heads as divide both it and 8: of such the array is made up.
    extra = -(all_heads + 2 * num_kv_heads) % math.gcd(size, 8)
    qkv = jnp.concatenate([q, k, v] + [jnp.zeros((num_tokens, extra, q.shape[2]), q.dtype)] * (extra > 0), axis=1)
    if not metadata.decodes_only and num_tokens < prefill_config.tokens:  # a block of queries must fit
        qkv = jnp.pad(qkv, ((0, prefill_config.tokens - num_tokens), (0, 0), (0, 0)))

    options = {"window": window, "cap": cap, "sinks": sinks, "interpret": interpret}
    new_slots = metadata.write_slots if metadata.decodes_only and splits == 1 else None
    if new_slots is None:
        cache = gpu_write.write(cache, qkv, all_heads, metadata, interpret=interpret)
    if interpret or not metadata.decodes_only or (then is not None and not gpu_prefetch.is_worth_it(then, num_tokens)):
        then = None  # the interpreter has no delays
    out, cache, own, shared, plan = gpu_decode.decode(
        qkv, cache, metadata, scales,
        group=size, splits=splits, config=decode_config, new_slots=new_slots, then=then, **options,
    )  # fmt: skip
    out_ref = jax.new_ref(out.reshape(qkv.shape[0], all_heads, qkv.shape[2]))
    gpu_merge.merge(
        out_ref, own, shared, plan,
        group=size, streams=decode_config.streams, multiprocessors=decode_config.blocks,
        clear=metadata.decodes_only, interpret=interpret,
    )  # fmt: skip
    if not metadata.decodes_only:
        gpu_prefill.prefill(qkv, cache, out_ref, metadata, scales, config=prefill_config, **options)
    out = jax.freeze(out_ref)[:num_tokens, :, :head_dim]
    if idle:
        out = out.reshape(num_tokens, num_kv_heads, group + idle, head_dim)[:, :, :group]
        out = out.reshape(num_tokens, num_heads, head_dim)
    return out, cache

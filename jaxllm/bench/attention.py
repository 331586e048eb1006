"""`jaxllm bench all`, part attention: one layer of ragged paged attention, its write included, at fixed batches.

On an accelerator the batches are those that the kernels are tuned on, over many layers' caches in turn, so that the
second-level cache cannot flatter; on a CPU they are small.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.bench.floor import Ceilings
from jaxllm.bench.trace import recording
from pallas_kernels.ragged_paged_attention import CacheSpec, cache_shape, ragged_paged_attention

Rows = list[tuple[int, int]]  # (query tokens, keys)
MAX_LAYERS, CACHES_BYTES = 32, 20_000_000_000  # as many layers as these bytes hold, on an accelerator
CPU_LAYERS = 2
KERNELS = "ragged_paged_decode", "ragged_paged_merge", "ragged_paged_prefill"  # on GPUs; decodes write themselves
WRITE = "ragged_paged_write"  # new keys and values of steps that are not decodes only
CACHE_TOKENS = 64 * 2048 + 16384  # of one layer's cache on an accelerator: the largest batch and some


@dataclasses.dataclass
class AttentionResult:
    """One batch. `seconds` a layer.

    Attributes:
      kind: "decode" or "prefill".
      seconds: by the clock, one jit of all layers after another: what joins queries, keys and values into one array and
        the pauses between calls count; in a step the rotation joins them.
      kernel_seconds: of the attention kernels alone, the writing one left out, by the profiler's record; None: there is
        none.
      bandwidth: bytes of keys and values read over the kernels' seconds, or over all where there are none; `flops` of
        the two products likewise.
      share: of this device's measured ceiling, bandwidth for decodes and FLOPs for prefills.
      write_seconds: of the kernel that writes new keys and values, where one of its own does; None likewise.
    """

    kind: str
    batch: str
    backend: str
    page_size: int
    seconds: float
    kernel_seconds: float | None
    bandwidth: float
    flops: float
    share: float | None
    write_seconds: float | None = None


def batches(on_cpu: bool) -> dict[tuple[str, str], Rows]:
    """Rows by (kind, name)."""
    if on_cpu:
        return {("decode", "4 × 256"): [(1, 256)] * 4, ("prefill", "1 × 128"): [(128, 128)]}
    ragged = [(1, int(keys)) for keys in np.random.default_rng(0).integers(64, 705, 256)]
    return {
        ("decode", "64 × 2048"): [(1, 2048)] * 64,
        ("decode", "8 × 8192"): [(1, 8192)] * 8,
        ("decode", "256 × 384 ragged"): ragged,
        ("decode", "1 × 8192"): [(1, 8192)],
        ("decode", "1 × 512"): [(1, 512)],
        ("prefill", "1 × 8192"): [(8192, 8192)],
        ("prefill", "4 × 2048"): [(2048, 2048)] * 4,
        ("prefill", "2048 over 14k"): [(2048, 16384)],
    }


def measure_attention(
    hf: Mapping[str, Any],
    *,
    backend: str,
    dtype: Any,
    page_size: int,
    ceilings: Ceilings | None = None,
    given: Mapping[tuple[str, str], Rows] | None = None,
) -> Iterator[AttentionResult]:
    """Times every batch with the heads of a config.json, one after the other.

    Args:
      given: the batches; None: those of `batches`.
      ceilings: of one device.

    Raises:
      ValueError: the backend lacks these heads.
    """
    on_cpu = jax.default_backend() == "cpu"
    from pallas_kernels.ragged_paged_attention.stress_gpu import make_metadata  # imports Mosaic GPU, which takes time

    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    num_pages = (2048 if on_cpu else CACHE_TOKENS) // page_size + 1
    shape = cache_shape(CacheSpec(num_pages, page_size, kv_heads, head_dim, dtype), backend)
    fill = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), shape.shape, shape.dtype))
    held = CACHES_BYTES // (shape.size * shape.dtype.itemsize)
    caches = [fill(layer) for layer in range(CPU_LAYERS if on_cpu else max(1, min(MAX_LAYERS, held)))]

    @jax.jit  # once for all layers: lowering a Mosaic kernel takes seconds
    def one_layer(q, k, v, cache, metadata):
        return ragged_paged_attention(q, k, v, cache, metadata, backend=backend, scale=head_dim**-0.5)

    def layers(q, k, v, caches, metadata):
        made = []
        for cache in caches:
            q, cache = one_layer(q, k, v, cache, metadata)
            made.append(cache)
        return q, made

    for (kind, name), rows in (given or batches(on_cpu)).items():
        tokens = sum(queries for queries, _ in rows)
        metadata = make_metadata(
            np.random.default_rng(0),
            rows,
            page_size=page_size,
            num_pages=num_pages,
            tokens=tokens,
            max_rows=tokens if kind == "decode" else max(8, len(rows)),
            table_width=num_pages if on_cpu else 16384 // page_size,
            decodes_only=kind == "decode",  # as the engine promises of such a step
        )
        q = jax.random.normal(jax.random.key(1), (tokens, heads, head_dim), dtype)
        k, v = jax.random.normal(jax.random.key(2), (2, tokens, kv_heads, head_dim), dtype)
        run = jax.jit(layers, donate_argnums=3)
        out, caches = run(q, k, v, caches, metadata)
        times = []
        for _ in range(3):
            jax.block_until_ready((out, caches))
            begin = time.perf_counter()
            for _ in range(4):
                out, caches = run(q, k, v, caches, metadata)
            jax.block_until_ready(out)
            times.append((time.perf_counter() - begin) / 4 / len(caches))
        seconds, kernel_seconds, write_seconds = min(times), None, None
        if backend == "gpu":
            with recording() as events:
                out, caches = run(q, k, v, caches, metadata)
                jax.block_until_ready(out)
            kernel_seconds, write_seconds = (
                sum(end - start for name, start, end in events if name.startswith(names)) * 1e-9 / len(caches)
                for names in (KERNELS, WRITE)
            )
        pairs = sum(queries * keys - queries * (queries - 1) // 2 for queries, keys in rows)
        size = 2 * kv_heads * head_dim * jnp.dtype(dtype).itemsize * sum(keys for _, keys in rows)
        worked = kernel_seconds or seconds
        bandwidth, flops = size / worked, 4 * heads * head_dim * pairs / worked
        share = None
        if ceilings is not None:
            share = bandwidth / ceilings.bandwidth if kind == "decode" else flops / ceilings.flops
        yield AttentionResult(
            kind, name, backend, page_size, seconds, kernel_seconds, bandwidth, flops, share, write_seconds
        )

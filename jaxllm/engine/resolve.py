"""What the options left open, decided for a model on a device; and the arithmetic of memory."""

import dataclasses
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import EngineConfig
from jaxllm.core import memory
from jaxllm.core.kv_cache import CacheGroup
from jaxllm.core.scheduler import SchedulerConfig
from jaxllm.engine.gpu_memory import check_got_memory
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.models.decoder import CausalLM, LayerCache
from pallas_kernels.ragged_paged_attention import CacheSpec, cache_shape, tpu_sizes
from sharding import RULES, TENSOR

logger = logging.getLogger(__name__)

CPU_CACHE_BYTES = 400_000_000
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """All sizes of a running engine.

    Attributes:
      dtype: of weights, activations and cache.
      backend: the attention backend.
      scheduler: limits of each rank's scheduler.
      decode_rungs: sizes of steps of decodes only, ascending; none beyond the number of slots.
      groups: the cache groups, in the model's order.
      layers: what each layer keeps, in order.
      weight_bytes, cache_bytes: a device's share.
    """

    dtype: jnp.dtype
    backend: str
    scheduler: SchedulerConfig
    decode_rungs: tuple[int, ...]
    groups: tuple[CacheGroup, ...]
    layers: tuple[LayerCache, ...]
    weight_bytes: int
    cache_bytes: int

    @property
    def page_size(self) -> int:
        return self.groups[0].page_size

    def cache_spec(self, layer: LayerCache) -> CacheSpec:
        """The cache of one layer on one rank."""
        group = self.groups[layer.group]
        return CacheSpec(group.num_pages, group.page_size, layer.num_kv_heads, layer.head_dim, self.dtype)


def resolve_dtype(config: EngineConfig) -> jnp.dtype:
    """float32 on CPU, where XLA's bfloat16 products are several times slower; bfloat16 elsewhere."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(DTYPES[config.dtype])


def resolve_backend(config: EngineConfig) -> str:
    """What was asked for, else the TPU's or the Hopper kernel where it runs, else plain XLA, said in the log.

    Raises:
      ConfigError: an accelerator's kernel was asked for and there is no such accelerator, or one that it lacks.
    """
    if config.attention_backend in ("gpu", "tpu") and jax.default_backend() != config.attention_backend:
        name = config.attention_backend
        raise ConfigError(
            f"attention_backend={name!r}: needs a {name.upper()}; JAX runs on {jax.default_backend()!r} here"
        )
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "0.0"))
    is_hopper = capability.split(".")[0] == "9"
    has_sizes = device.platform == "tpu" and tpu_sizes.supports(device.device_kind)
    if config.attention_backend == "gpu" and not is_hopper:
        raise ConfigError(
            f"attention_backend='gpu': the kernels need Hopper (compute capability 9.0); this is {device.device_kind} "
            f"({capability}), where 'xla' runs"
        )
    if config.attention_backend == "tpu" and not has_sizes:
        raise ConfigError(f"attention_backend='tpu': the kernels have no sizes for {device.device_kind}; 'xla' runs")
    if config.attention_backend is not None:
        return config.attention_backend
    if device.platform == "tpu":
        if has_sizes:
            return "tpu"
        logger.warning("%s: attention runs through plain XLA, the kernel has no sizes for it", device.device_kind)
    if device.platform != "gpu":
        return "xla"
    if is_hopper:
        return "gpu"
    logger.warning(
        "%s (compute capability %s): attention runs through plain XLA, the kernel needs Hopper (9.0)",
        device.device_kind,
        capability,
    )
    return "xla"


def _backend_for(config: EngineConfig, model: CausalLM, dtype) -> str:
    """`resolve_backend`, or plain XLA for a model that the Hopper kernels lack, said in the log.

    Raises:
      ConfigError: they were asked for.
    """
    backend = resolve_backend(config)
    if backend != "gpu":
        return backend
    from pallas_kernels.ragged_paged_attention import gpu  # Pallas takes time to import

    for layer in model.layer_caches():
        spec = CacheSpec(1, config.page_size, layer.num_kv_heads, layer.head_dim, dtype)
        if (lacking := gpu.lacks(spec)) is None:
            continue
        if config.attention_backend is not None:
            raise ConfigError(f"attention_backend='gpu': {lacking}, is not supported; 'xla' takes it")
        logger.warning("%s: attention runs through plain XLA, the kernels for Hopper do not take that", lacking)
        return "xla"
    return backend


def decode_rungs(config: EngineConfig, max_num_seqs: int, on_cpu: bool) -> tuple[int, ...]:
    """Sizes of steps in which every row has one token: what running requests need while no prompt is computed.

    Raises:
      ConfigError: one is larger than the number of slots.
    """
    if config.decode_rungs is None:
        return memory.default_decode_rungs(max_num_seqs, on_cpu)
    if config.decode_rungs and config.decode_rungs[-1] > max_num_seqs:
        raise ConfigError(f"decode_rungs={config.decode_rungs}: the last may be max_num_seqs={max_num_seqs} at most")
    return config.decode_rungs


def plan_engine(config: EngineConfig, model: CausalLM, least: Callable[[int], int] = int) -> EnginePlan:
    """Decides every size before anything is allocated.

    least: the least of a number over all processes that plan together.

    Raises:
      ConfigError: options that do not fit the model or each other.
      OutOfMemoryError: the weights and the cache do not fit, or the cache is too small to be useful.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtype = resolve_dtype(config)
    backend = _backend_for(config, model, dtype)
    limit = model.config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(f"max_model_len={config.max_model_len}: the model's limit is {limit}")
    max_num_seqs, budget = memory.default_limits(config, jax.default_backend())
    rungs = config.token_rungs or memory.default_rungs(budget, jax.default_backend())

    layers = model.layer_caches()
    weight_bytes = weight_elements(model) * dtype.itemsize
    cache_bytes = config.kv_cache_memory_bytes or (
        CPU_CACHE_BYTES if on_cpu else least(_memory_left(config, model, weight_bytes, budget, max_num_seqs, dtype))
    )
    groups = _cache_groups(config, layers, dtype, backend, cache_bytes, max_num_seqs, budget, limit)
    max_model_len = config.max_model_len or _most_that_fits(groups, limit)
    scheduler = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        policy=config.scheduling_policy,
        token_rungs=rungs,
        weight_bound_tokens=32 if on_cpu else 256,
        max_waiting_requests=config.max_waiting_requests,
        max_waiting_tokens=config.max_waiting_tokens,
    )
    decodes = decode_rungs(config, max_num_seqs, on_cpu)
    plan = EnginePlan(dtype, backend, scheduler, decodes, groups, layers, weight_bytes, cache_bytes)
    memory.check_longest_fits(plan.groups, max_model_len, cache_bytes)
    if config.kv_cache_memory_bytes is not None:
        check_got_memory(jax.local_devices()[: config.num_devices], needed=weight_bytes + cache_bytes)
    if on_cpu:
        _check_host_memory(config, plan, model.config.shard_vocab)
    return plan


def weight_elements(model: CausalLM) -> int:
    """Elements of all parameters on one device."""
    total = 0
    for parameter in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Param)):
        metadata = parameter.get_metadata()
        is_cut = any(RULES[axis] == TENSOR for axis in metadata["axes"])
        total += parameter.size // (metadata["shards"] if is_cut else 1)
    return total


def _page_bytes(layers: tuple[LayerCache, ...], group: int, page_size: int, dtype, backend: str) -> int:
    """Bytes of one page in all layers of a group."""
    total = 0
    for layer in layers:
        if layer.group == group:
            spec = CacheSpec(1, page_size, layer.num_kv_heads, layer.head_dim, dtype)
            total += cache_shape(spec, backend).size * dtype.itemsize
    return total


def _cache_groups(
    config: EngineConfig, layers, dtype, backend: str, cache_bytes: int, max_num_seqs: int, budget: int, limit: int
) -> tuple[CacheGroup, ...]:
    """See `jaxllm.core.memory.cache_groups`."""
    windows: dict[int, int | None] = {layer.group: layer.window for layer in layers}
    try:
        page_bytes = {group: _page_bytes(layers, group, config.page_size, dtype, backend) for group in windows}
    except ValueError as error:
        raise ConfigError(f"page_size={config.page_size}, attention_backend={backend!r}: {error}") from error
    return memory.cache_groups(
        windows,
        page_bytes,
        cache_bytes,
        page_size=config.page_size,
        max_num_seqs=max_num_seqs,
        budget=budget,
        longest=config.max_model_len or limit,
        asked=config.kv_cache_memory_bytes,
    )


def _most_that_fits(groups: tuple[CacheGroup, ...], limit: int) -> int:
    """The longest request that the cache holds, at most the model's limit."""
    longest = memory.longest_that_fits(groups, limit)
    if longest < limit:
        logger.warning("max_model_len is %d, what the cache holds; the model's limit is %d", longest, limit)
    return longest


def host_memory() -> int:
    """Bytes that this machine can still give: what Linux says is available, at most its physical memory."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return min(physical, int(found[1]) * 1024) if found else physical


def _check_host_memory(config: EngineConfig, plan: EnginePlan, vocab_size: int) -> None:
    """Raises OutOfMemoryError if what all devices on CPU will allocate is more than the machine has left.

    vocab_size: of one tensor-parallel shard.
    """
    page_bytes = [
        _page_bytes(plan.layers, index, plan.page_size, plan.dtype, plan.backend) for index in range(len(plan.groups))
    ]
    pages = sum(group.num_pages * size for group, size in zip(plan.groups, page_bytes, strict=True))
    slots = plan.scheduler.max_num_seqs
    count = min(config.num_devices, jax.local_device_count())  # of several processes, this one's part
    tables = memory.table_bytes(slots, vocab_size, plan.scheduler.max_model_len)
    each, available = plan.weight_bytes + pages + tables, host_memory()
    if count * each <= available:
        return
    left = available // count - plan.weight_bytes - tables - sum(page_bytes)  # each group has a page for padding
    fits = f"kv_cache_memory_bytes={left} would fit" if left > 0 else "nothing is left for the KV cache"
    raise OutOfMemoryError(
        f"weights take {plan.weight_bytes / 1e9:.3g} GB, the KV cache {pages / 1e9:.3g} GB, the tables of "
        f"max_num_seqs={slots} {tables / 1e9:.3g} GB: {each / 1e9:.3g} GB, times {count} "
        f"(data_parallel_size={config.data_parallel_size}, tensor_parallel_size={config.tensor_parallel_size}); this "
        f"machine has {available / 1e9:.3g} GB left: {fits}"
    )


def _memory_left(config: EngineConfig, model, weight_bytes: int, budget: int, max_num_seqs: int, dtype) -> int:
    """An accelerator's memory less weights, the largest step's temporaries and the slots' tables."""
    check_got_memory(jax.local_devices()[: config.num_devices])
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    if not limit:
        raise ConfigError("this device does not tell its memory: set kv_cache_memory_bytes")
    shape = model.config
    step = memory.step_bytes(
        budget,
        max_num_seqs,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size // shape.tensor_shards,
        vocab_size=shape.shard_vocab,
        itemsize=dtype.itemsize,
    )
    length = config.max_model_len or shape.max_position_embeddings
    tables = memory.table_bytes(max_num_seqs, shape.shard_vocab, length)
    return memory.Budget(limit, config.memory_utilization, weight_bytes, step, tables, budget).cache()

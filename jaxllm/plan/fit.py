"""What of a model lies on each device of a mesh, and how much cache is left: the engine's arithmetic, no device."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from jaxllm.bench.floor import ModelCost
from jaxllm.config import EngineConfig
from jaxllm.core import memory
from jaxllm.core.kv_cache import CacheGroup, cdiv
from jaxllm.core.scheduler import SchedulerConfig
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.plan.chips import Calibration, Chip
from jaxllm.plan.times import Clock

if TYPE_CHECKING:
    from jaxllm.models.config import DecoderConfig
    from jaxllm.models.decoder import LayerCache

DTYPES = {"auto": "bfloat16", "bfloat16": "bfloat16", "float32": "float32"}  # what accelerators make of them
ITEMSIZES = {"bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Model:
    """What a plan must know of a model.

    Attributes:
      name: as users call it.
      config: its sizes.
      shapes: of all parameters.
      layers: what each layer keeps.
      cost: on one device, in the plan's dtype.
      dtype: "bfloat16" or "float32".
    """

    name: str
    config: "DecoderConfig"
    shapes: tuple[tuple[int, ...], ...]
    layers: tuple["LayerCache", ...]
    cost: ModelCost
    dtype: str

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]


def read_model(name: str, hf: dict[str, Any], dtype: str) -> Model:
    """A model from the contents of its config.json. JAX is imported and no device of it is touched.

    Raises UnsupportedModelError for what jaxllm does not run.
    """
    import jax
    import jax.numpy as jnp

    from jaxllm.models.registry import model_class

    family = model_class(hf)
    config = family.parse_config(hf)
    model = family(config, dtype=jnp.dtype(dtype))
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(model))
    cost = ModelCost.from_config(hf, ITEMSIZES[dtype], config.windows)
    return Model(name, config, shapes, model.layer_caches(), cost, dtype)


def tensor_sizes(config: "DecoderConfig", most: int) -> list[int]:
    """Tensor shards, `most` at most, over which the model divides: query heads and the MLP's width evenly; key-value
    heads evenly too, or the shards over them, which then hold copies."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return [
        size
        for size in range(1, most + 1)
        if heads % size == 0 and config.intermediate_size % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    ]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A model on a mesh: the sizes of one device, and of one data-parallel rank.

    Attributes:
      data, tensor: the mesh.
      budget: where a device's memory goes.
      cache_bytes: for the KV cache of a device.
      groups: the cache groups of a rank.
      scheduler, decode_rungs: as the engine would choose them.
    """

    data: int
    tensor: int
    budget: memory.Budget
    cache_bytes: int
    groups: tuple[CacheGroup, ...]
    scheduler: SchedulerConfig
    decode_rungs: tuple[int, ...]

    @property
    def cache_tokens(self) -> int:
        """Tokens that the caches of all ranks hold together; of windowed layers only what is in the window counts."""
        full = [group for group in self.groups if group.window is None] or list(self.groups)
        return self.data * min((group.num_pages - 1) * group.page_size for group in full)

    def requests(self, num_tokens: int) -> int:
        """How many requests of so many tokens all ranks can run at once, at most their slots."""
        if num_tokens > self.scheduler.max_model_len:
            return 0
        most = self.scheduler.max_num_seqs
        for group in self.groups:
            pages = cdiv(num_tokens, group.page_size)
            if group.window is not None:
                pages = min(pages, cdiv(group.window - 1, group.page_size) + 1)
            most = min(most, (group.num_pages - 1) // pages)
        return self.data * most


def fit(model: Model, chip: Chip, config: EngineConfig, *, data: int, tensor: int) -> Fit:
    """Lays a model out over data x tensor devices of a chip.

    Raises:
      ConfigError: options or a mesh that the model does not allow.
      OutOfMemoryError: weights, steps and the cache of one request do not fit: the message shows the sum.
    """
    shape, itemsize = model.config, model.itemsize
    limit = shape.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(f"max_model_len={config.max_model_len}: the model's limit is {limit}")
    if tensor not in tensor_sizes(shape, tensor):
        allowed = ", ".join(map(str, tensor_sizes(shape, shape.num_attention_heads)))
        raise ConfigError(f"tensor_parallel_size={tensor}: {model.name} divides over {allowed}")
    max_num_seqs, step_tokens = memory.default_limits(config, on_cpu=False)
    vocab = cdiv(shape.vocab_size, tensor)
    budget = memory.Budget(
        limit=chip.device_limit,
        utilization=config.memory_utilization,
        weights=_weights(model, tensor),
        step=memory.step_bytes(
            step_tokens,
            max_num_seqs,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size // tensor,
            vocab_size=vocab,
            itemsize=itemsize,
        ),
        tables=memory.table_bytes(max_num_seqs, vocab, config.max_model_len or limit),
        step_tokens=step_tokens,
    )
    left = budget.cache()
    cache_bytes = config.kv_cache_memory_bytes or left
    if cache_bytes > left:
        raise OutOfMemoryError(
            f"kv_cache_memory_bytes={cache_bytes}: {left} bytes are left of {chip.name}'s "
            f"{config.memory_utilization:.0%} of {budget.limit / 1e9:.1f} GB"
        )
    windows = {layer.group: layer.window for layer in model.layers}
    groups = memory.cache_groups(
        windows,
        {group: _page_bytes(model, group, chip, config, tensor) for group in windows},
        cache_bytes,
        page_size=config.page_size,
        max_num_seqs=max_num_seqs,
        budget=step_tokens,
        longest=config.max_model_len or limit,
        asked=config.kv_cache_memory_bytes,
    )
    max_model_len = config.max_model_len or memory.longest_that_fits(groups, limit)
    memory.check_longest_fits(groups, max_model_len, cache_bytes)
    scheduler = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens,
        max_model_len=max_model_len,
        token_rungs=config.token_rungs or memory.default_rungs(step_tokens, on_cpu=False),
    )
    decodes = config.decode_rungs or memory.default_decode_rungs(max_num_seqs, on_cpu=False)
    return Fit(data, tensor, budget, cache_bytes, groups, scheduler, decodes)


def _copies(model: Model, tensor: int) -> int:
    """How often each key-value head lies on the shards."""
    return max(1, tensor // model.config.num_key_value_heads)


def _weights(model: Model, tensor: int) -> int:
    """Bytes of a shard's weights: matrices are cut (the vocabulary is padded, key-value heads may be copied), vectors
    are not."""
    shape = model.config
    total = 0
    for size in model.shapes:
        if len(size) < 2:
            total += math.prod(size)
            continue
        cut = [cdiv(extent, tensor) if extent == shape.vocab_size else extent for extent in size]
        total += math.prod(cut) if shape.vocab_size in size else cdiv(math.prod(size), tensor)
    copied = 2 * shape.num_key_value_heads * shape.head_dim * shape.hidden_size * (_copies(model, tensor) - 1)
    return model.itemsize * (total + shape.num_hidden_layers * copied // tensor)


def _page_bytes(model: Model, group: int, chip: Chip, config: EngineConfig, tensor: int) -> int:
    """Bytes of one page in a shard of all layers of a group, in the layout of the chip's attention backend."""
    import jax.numpy as jnp

    from pallas_kernels.ragged_paged_attention import CacheSpec, cache_shape

    backend = config.attention_backend or chip.attention_backend
    total = 0
    for layer in model.layers:
        if layer.group == group:
            heads = max(1, layer.num_kv_heads // tensor)
            spec = CacheSpec(1, config.page_size, heads, layer.head_dim, jnp.dtype(model.dtype))
            try:
                total += cache_shape(spec, backend).size * model.itemsize
            except ValueError as error:
                raise ConfigError(f"page_size={config.page_size}, dtype={model.dtype!r}: {error}") from error
    return total


def clock(model: Model, chip: Chip, calibration: Calibration | None, tensor: int) -> Clock:
    """The times of steps on one device of `tensor` shards."""
    return Clock(
        chip,
        calibration,
        model.cost,
        tensor,
        kv_copies=_copies(model, tensor),
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
    )

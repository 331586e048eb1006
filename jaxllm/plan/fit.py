"""What of a model lies on each device of a mesh, and how much cache is left: the engine's arithmetic, no device."""

import dataclasses
import functools
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
    from jaxllm.models.decoder import CausalLM, LayerCache

DTYPES = {"auto": "bfloat16", "bfloat16": "bfloat16", "float32": "float32"}  # what accelerators make of them
ITEMSIZES = {"bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tensor shard of a model: how many parameters it holds, and what each layer keeps there."""

    elements: int
    layers: tuple["LayerCache", ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What a plan must know of a model.

    Attributes:
      name: as users call it.
      family: its class.
      config: its sizes.
      cost: on one device, in the plan's dtype.
      dtype: "bfloat16" or "float32".
    """

    name: str
    family: "type[CausalLM]"
    config: "DecoderConfig"
    cost: ModelCost
    dtype: str

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @functools.cached_property
    def _shards(self) -> dict[int, Shard]:
        return {}

    def shard(self, tensor: int) -> Shard:
        """One of so many tensor shards, as the engine cuts them. Raises ConfigError if the model does not divide so."""
        import jax.numpy as jnp

        from jaxllm.engine.resolve import weight_elements

        if tensor not in self._shards:
            model = self.family(self.config.for_shards(tensor), dtype=jnp.dtype(self.dtype))
            self._shards[tensor] = Shard(weight_elements(model), model.layer_caches())
        return self._shards[tensor]


def read_model(name: str, hf: dict[str, Any], dtype: str) -> Model:
    """A model from the contents of its config.json. JAX is imported and no device of it is touched.

    Raises UnsupportedModelError for what jaxllm does not run.
    """
    from jaxllm.models.registry import model_class

    family = model_class(hf)
    config = family.parse_config(hf)
    cost = ModelCost.from_config(hf, ITEMSIZES[dtype], config.windows)
    return Model(name, family, config, cost, dtype)


def tensor_sizes(config: "DecoderConfig", most: int) -> list[int]:
    """Tensor shards, `most` at most, over which the model divides."""
    return [size for size in config.shard_counts if size <= most]


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
    limit = model.config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(f"max_model_len={config.max_model_len}: the model's limit is {limit}")
    shape, part = model.config.for_shards(tensor), model.shard(tensor)
    max_num_seqs, step_tokens = memory.default_limits(config, chip.platform)
    budget = memory.Budget(
        limit=chip.device_limit(data * tensor),
        utilization=config.memory_utilization,
        weights=part.elements * model.itemsize,
        step=memory.step_bytes(
            step_tokens,
            max_num_seqs,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size // tensor,
            vocab_size=shape.shard_vocab,
            itemsize=model.itemsize,
        ),
        tables=memory.table_bytes(max_num_seqs, shape.shard_vocab, config.max_model_len or limit),
        step_tokens=step_tokens,
    )
    left = budget.cache()
    cache_bytes = config.kv_cache_memory_bytes or left
    if cache_bytes > left:
        raise OutOfMemoryError(
            f"kv_cache_memory_bytes={cache_bytes}: {left} bytes are left of {chip.name}'s "
            f"{config.memory_utilization:.0%} of {budget.limit / 1e9:.1f} GB"
        )
    windows = {layer.group: layer.window for layer in part.layers}
    groups = memory.cache_groups(
        windows,
        {group: _page_bytes(model, part, group, chip, config) for group in windows},
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
        token_rungs=config.token_rungs or memory.default_rungs(step_tokens, chip.platform),
    )
    decodes = config.decode_rungs or memory.default_decode_rungs(max_num_seqs, on_cpu=False)
    return Fit(data, tensor, budget, cache_bytes, groups, scheduler, decodes)


def _page_bytes(model: Model, part: Shard, group: int, chip: Chip, config: EngineConfig) -> int:
    """Bytes of one page in a shard of all layers of a group, in the layout of the chip's attention backend."""
    import jax.numpy as jnp

    from pallas_kernels.ragged_paged_attention import CacheSpec, cache_shape

    backend = config.attention_backend or chip.attention_backend
    total = 0
    for layer in part.layers:
        if layer.group == group:
            spec = CacheSpec(1, config.page_size, layer.num_kv_heads, layer.head_dim, jnp.dtype(model.dtype))
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
        kv_copies=model.config.for_shards(tensor).kv_copies,
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
    )

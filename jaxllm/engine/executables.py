"""Which executables an engine needs, how each is traced, and in which order they are wanted."""

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.core.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from jaxllm.engine.layout import ROW
from jaxllm.engine.platform import tpu_compiler_options
from jaxllm.engine.resolve import EnginePlan
from jaxllm.engine.sampling import VARIANTS, SamplerVariant, mask_words
from jaxllm.engine.step import (
    SlotState,
    StepBuffers,
    StepShape,
    apply_page_updates,
    forward,
    pooled_rows,
    sample_rows,
    upload_row,
    wide_logprobs,
    write_masks,
)
from pallas_kernels.ragged_paged_attention import cache_shape
from sharding import DATA, TENSOR, spans_processes

WIDE_ROWS = 64  # rows of logits that a wide-logprobs executable holds at a time
POOL_ROWS = 64  # last hidden rows that are read at a time
SAMPLER_TABLES = ("bias", "stop_mask", "bad_words")
VOCAB_TABLES = ("bias", "stop_mask")  # whose columns are the vocabulary
PER_DEVICE = P((DATA, TENSOR))
FORWARD_DONATES = (1, 2, 3, 4)  # arguments of `step.forward` after the static ones
FORWARD_RETURNS = (PER_DEVICE, P(DATA), P(DATA), P(DATA), P(DATA))  # where each of its results lies
MANY_UPDATES = 1024  # page updates of the executable that takes what a step has no room for


@dataclasses.dataclass(frozen=True)
class Forward:
    """A step's forward pass over a rung of tokens; `decodes_only`: each row has one; `all_hidden`: it leaves the hidden
    rows of all tokens, for the logprobs of prompts, and is compiled at first use."""

    num_tokens: int
    decodes_only: bool = False
    all_hidden: bool = False


@dataclasses.dataclass(frozen=True)
class Stage:
    """Copying a step's packed array from where the host's transfer put it to where `Forward` always finds it."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sampling a rung of rows."""

    num_rows: int
    variant: SamplerVariant


@dataclasses.dataclass(frozen=True)
class MakeTables:
    """The sampler's tables, zeros, without the history: made when the first request asks."""


@dataclasses.dataclass(frozen=True)
class Upload:
    """Writing one slot's row of a table."""

    table: str


@dataclasses.dataclass(frozen=True)
class WriteMasks:
    """Writing a step's grammar masks, a rung of them, to their slots."""

    num_masks: int


@dataclasses.dataclass(frozen=True)
class UpdatePages:
    """Page updates beyond those that travel with a step."""


@dataclasses.dataclass(frozen=True)
class Wide:
    """Logprobs of many alternatives for WIDE_ROWS of `num_hidden` hidden rows; compiled at first use."""

    num_hidden: int
    k: int


@dataclasses.dataclass(frozen=True)
class Pool:
    """Reading POOL_ROWS of the rows' last hidden rows, for embeddings."""


def row_rungs(max_num_seqs: int, decode_rungs: Sequence[int] = ()) -> tuple[int, ...]:
    """Row counts of the sampler: that of the smallest step of decodes (1 without), then each 8 times the one before, up
    to all slots. Where decodes have rungs of their own the least is 2: for one row's logits in float32 XLA:GPU sums
    over a converted head, which with that of Llama-3.1-8B takes 1.3 ms longer than the product of two rows. There 64 is
    one, too: of a small model's FLOPs logits are a fifth, which steps of 64 decodes would else do twice."""
    rungs = [min(max(2, decode_rungs[0]) if decode_rungs else 1, max_num_seqs)]
    while rungs[-1] * 8 < max_num_seqs:
        rungs.append(rungs[-1] * 8)
    return tuple(sorted({*rungs, *(size for size in decode_rungs if size == 64), max_num_seqs}))


class Lowering:
    """Traces executables from abstract arguments: nothing is allocated, so that it can run while weights load.

    Args:
      leaves: the model's parameters, abstract, with their shardings on the mesh.
    """

    def __init__(self, shape: StepShape, plan: EnginePlan, leaves: list[jax.ShapeDtypeStruct], mesh: Mesh):
        self.shape, self.plan, self.mesh = shape, plan, mesh
        self.ranks = mesh.shape[DATA]
        self.leaves, self._leaf_specs = leaves, [leaf.sharding.spec for leaf in leaves]
        self._turn = threading.Lock()  # tracing holds the GIL: side by side, the first would end with the last
        self._head = [leaves[at] for at in shape.head]
        self._head_specs = [leaf.sharding.spec for leaf in self._head]

    def _array(self, shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def per_rank(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array whose first axis holds each rank's part."""
        return self._array((self.ranks * shape[0], *shape[1:]), dtype, P(DATA))

    def per_device(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array whose first axis holds the part of each shard of each rank."""
        devices = self.ranks * self.shape.tensor_shards
        return self._array((devices * shape[0], *shape[1:]), dtype, PER_DEVICE)

    def caches(self) -> list[jax.ShapeDtypeStruct]:
        """One array a layer; a shard's part holds its own heads, in whatever layout the backend has."""
        specs = [cache_shape(self.plan.cache_spec(layer), self.plan.backend) for layer in self.plan.layers]
        return [self.per_device(spec.shape, spec.dtype) for spec in specs]

    def state(self) -> SlotState:
        """The slots' lengths and page tables, abstract."""
        slots = self.plan.scheduler.max_num_seqs
        width = -(-self.plan.scheduler.max_model_len // self.plan.page_size)
        tables: Any = tuple(self.per_rank((slots, width), jnp.int32) for _ in self.plan.groups)
        num_computed: Any = self.per_rank((slots,), jnp.int32)
        return SlotState(num_computed, tables)

    def tables(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The sampler's tables by name, see `SlotTables`."""
        slots, shards = self.plan.scheduler.max_num_seqs, self.shape.tensor_shards
        vocab = (self.ranks * slots, shards * -(-self.shape.vocab_size // shards))  # padded as the logits are
        return {
            "history": self.per_rank((slots, self.plan.scheduler.max_model_len), jnp.int32),
            "bias": self._array(vocab, jnp.float32, self._over_vocab),
            "stop_mask": self._array(vocab, jnp.bool_, self._over_vocab),
            "bad_words": self.per_rank((slots, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), jnp.int32),
        }

    @property
    def _over_vocab(self) -> P:
        return P(DATA, self.shape.vocab_axis)

    @property
    def _rank_axis(self) -> str | None:
        return DATA if self.ranks > 1 else None

    def sampler_tables(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What `sample_rows` takes as tables, in the order of SAMPLER_TABLES."""
        tables = self.tables()
        return tuple(tables[name] for name in SAMPLER_TABLES)

    def masks(self, num_rows: int) -> jax.ShapeDtypeStruct:
        """Grammar masks of each rank."""
        return self.per_rank((num_rows, mask_words(self.shape.vocab_size)), jnp.int32)

    def hidden(self, num_rows: int) -> jax.ShapeDtypeStruct:
        """Hidden rows of each rank."""
        return self.per_rank((num_rows, self.hidden_size), self.plan.dtype)

    @property
    def hidden_size(self) -> int:
        return self.shape.model(self.leaves).config.hidden_size

    def __call__(self, key: Any):
        """Traces and lowers one executable, one at a time, whatever thread asks."""
        with self._turn:
            return getattr(self, f"_{type(key).__name__.lower()}")(key)

    def packed(self) -> jax.ShapeDtypeStruct:
        """A step's packed array."""
        return self.per_rank((self.shape.layout.size,), jnp.int32)

    def buffers(self) -> StepBuffers:
        """What a step leaves for the sampler, abstract."""
        slots = self.plan.scheduler.max_num_seqs
        rows: Any = self.per_rank((slots, ROW), jnp.int32)
        last_hidden: Any = self.hidden(slots)
        return StepBuffers(rows, last_hidden)

    def _sharded(self, function, in_specs, out_specs, donate: tuple[int, ...], keep_unused: bool = False):
        """Runs `function` on each device's own part. `keep_unused`: arguments that are not read are there for their
        memory, which is donated."""
        mapped = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        options = None
        if self.plan.backend == "tpu":
            options = tpu_compiler_options(self.mesh.devices.flat[0].device_kind, self.hidden_size)
        return jax.jit(mapped, donate_argnums=donate, keep_unused=keep_unused, compiler_options=options)

    def forward_arguments(self) -> tuple[Any, ...]:
        """What `step.forward` takes after its static arguments, abstract."""
        history = self.tables()["history"]
        return self.leaves, self.caches(), self.state(), self.buffers(), history, self.packed(), self.peers()

    def peers(self) -> jax.ShapeDtypeStruct | None:
        """Where the shards' memory lies that sums go through; None where there are no such sums."""
        shards = self.shape.tensor_shards
        if self.shape.stream_axis is None or self.plan.backend != "gpu":
            return None
        deals_out = self.shape.model(self.leaves).deals_out_stream(self.plan.dtype, shards, self.plan.backend)
        return self.per_device((shards + 1, 2), jnp.int32) if deals_out else None

    def _forward(self, key: Forward):
        run = self._sharded(
            functools.partial(forward, self.shape, key.num_tokens, key.decodes_only, key.all_hidden),
            (self._leaf_specs, PER_DEVICE, P(DATA), P(DATA), P(DATA), P(DATA), PER_DEVICE),
            FORWARD_RETURNS,
            donate=FORWARD_DONATES,
            keep_unused=True,
        )
        return run.lower(*self.forward_arguments())

    def _stage(self, key: Stage):
        packed = self.packed()
        run = jax.jit(lambda old, new: new, donate_argnums=0, keep_unused=True, out_shardings=packed.sharding)
        return run.lower(packed, packed)

    def _sample(self, key: Sample):
        slots, history = self.plan.scheduler.max_num_seqs, self.tables()["history"]
        extra = self.sampler_tables() if key.variant.adjust else None
        masks = self.masks(slots) if key.variant.masked else None
        tables = P(DATA) if extra is None else tuple(spec.sharding.spec for spec in extra)
        everywhere = self.ranks > 1 and spans_processes(self.mesh)  # the process that reads has not all ranks
        run = self._sharded(
            functools.partial(sample_rows, self.shape, key.variant, key.num_rows, DATA if everywhere else None),
            (self._head_specs, P(DATA), P(DATA), P(DATA), tables, P(DATA)),
            (P(DATA), P() if everywhere else P(DATA)),
            donate=(3,),
        )
        rows = self.per_rank((slots, ROW), jnp.int32)
        return run.lower(self._head, self.hidden(slots), rows, history, extra, masks)

    def _maketables(self, key: MakeTables):
        specs = self.sampler_tables()
        run = jax.jit(
            lambda: tuple(jnp.zeros(spec.shape, spec.dtype) for spec in specs),
            out_shardings=tuple(spec.sharding for spec in specs),
        )
        return run.lower()

    def _upload(self, key: Upload):
        table = self.tables()[key.table]
        spec = table.sharding.spec
        is_over_vocab = key.table in VOCAB_TABLES
        row = self._array((self.shape.vocab_size,) if is_over_vocab else table.shape[1:], table.dtype, P())
        slot = self._array((), jnp.int32, P())
        vocab_axis = self.shape.vocab_axis if is_over_vocab else None
        upload = functools.partial(upload_row, self._rank_axis, vocab_axis)
        return self._sharded(upload, (spec, P(), P()), spec, donate=(0,)).lower(table, slot, row)

    def _writemasks(self, key: WriteMasks):
        table, masks = self.masks(self.plan.scheduler.max_num_seqs), self.masks(key.num_masks)
        run = self._sharded(write_masks, (P(DATA), P(DATA), P(DATA)), P(DATA), donate=(0,))
        return run.lower(table, self.per_rank((key.num_masks,), jnp.int32), masks)

    def _updatepages(self, key: UpdatePages):
        updates = self.per_rank((len(self.plan.groups), MANY_UPDATES, 3), jnp.int32)
        run = self._sharded(apply_page_updates, (P(DATA), P(DATA)), P(DATA), donate=(0,))
        return run.lower(self.state().page_tables, updates)

    def _wide(self, key: Wide):
        rows = self._array((WIDE_ROWS,), jnp.int32, P())
        run = self._sharded(
            functools.partial(wide_logprobs, self.shape, key.k, self._rank_axis),
            (self._head_specs, P(DATA), P(), P()),
            P(),
            donate=(),
        )
        return run.lower(self._head, self.hidden(key.num_hidden), rows, rows)

    def _pool(self, key: Pool):
        rows = self._array((POOL_ROWS,), jnp.int32, P())
        run = self._sharded(functools.partial(pooled_rows, self._rank_axis), (P(DATA), P()), P(), donate=())
        return run.lower(self.hidden(self.plan.scheduler.max_num_seqs), rows)


def smallest_decode(plan: EnginePlan) -> Forward:
    """The step that a single running request takes."""
    return Forward(plan.decode_rungs[0], True) if plan.decode_rungs else Forward(plan.scheduler.token_rungs[0])


def warm_up_order(plan: EnginePlan) -> list[Any]:
    """Everything that serving may meet but `Wide`, most needed first."""
    rungs = plan.scheduler.token_rungs
    rows = row_rungs(plan.scheduler.max_num_seqs, plan.decode_rungs)
    keys: list[Any] = [Stage(), smallest_decode(plan)]
    free = [variant for variant in VARIANTS if not variant.masked]
    keys += [Sample(rows[0], variant) for variant in free]  # small, and all that single requests need
    finer = [rung for rung in rungs[:-1] if rung & (rung - 1)]  # between powers of two: they only save padding
    steps = [Forward(rung) for rung in rungs if rung not in finer] + [Forward(rung, True) for rung in plan.decode_rungs]
    keys += sorted(steps, key=lambda step: (-step.num_tokens, step.decodes_only))
    keys += [Sample(count, variant) for variant in free for count in reversed(rows)]
    keys += [Forward(rung) for rung in finer]
    keys += [MakeTables(), Upload("history"), *(Upload(table) for table in SAMPLER_TABLES), UpdatePages(), Pool()]
    keys += [Sample(count, variant) for variant in VARIANTS if variant.masked for count in rows]
    keys += [WriteMasks(count) for count in rows]
    return list(dict.fromkeys(keys))

"""Steps of the engine compiled for TPUs that are not there, with their memory, bytes, FLOPs and collectives."""

import dataclasses
import functools
import random
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.bench.floor import Ceilings, Work
from jaxllm.bench.workloads import MODEL_SHAPES
from jaxllm.config import EngineConfig
from jaxllm.engine.build import abstract_leaves
from jaxllm.engine.executables import Forward, Lowering, Sample, row_rungs
from jaxllm.engine.resolve import EnginePlan
from jaxllm.engine.runner import layout_of
from jaxllm.engine.sampling import GREEDY
from jaxllm.engine.step import StepShape
from jaxllm.models.registry import model_class
from jaxllm.plan import hlo, hlo_cost
from jaxllm.plan.activations import Activations, least_prefill
from jaxllm.plan.chips import chip as chip_named
from jaxllm.plan.fit import Fit, Model, clock, fit, read_model
from pallas_kernels.argmax_projection import tpu as argmax_projection
from pallas_kernels.gated_matmul import tpu as gated_matmul
from pallas_kernels.qk_norm_rope import Heads
from pallas_kernels.qkv_projection import tpu as qkv_projection
from pallas_kernels.ragged_paged_attention import tpu_sizes, tpu_traffic
from sharding import DATA, EXPERT, TENSOR
from tests.tpu_topology import compiling_for, kernel_vmem


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a mesh of tensor shards.

    Attributes:
      model: a name of MODEL_SHAPES.
      chip: a name of chips.json.
      topology: libtpu's name of the slice.
      layers: how many of the model's; None: all.
    """

    model: str
    chip: str
    topology: str | None = None
    tensor: int = 1
    layers: int | None = None

    def __str__(self) -> str:
        where = self.topology or self.chip
        return f"{self.model} on {where}" + (f", {self.layers} layers" if self.layers else "")


CASES = (
    Case("llama-3.1-8b", "v6e"),
    Case("llama-3.1-8b", "v5e", "v5e:2x2", 4),
    Case("llama-3.3-70b", "v5e", "v5e:4x4", 16),
    *(Case("qwen3-0.6b", chip) for chip in ("v4", "v5e", "v5p", "v6e", "tpu7x")),
)


@dataclasses.dataclass(frozen=True)
class Step:
    """Rows of a step: query tokens, and keys that each sees, its own included; rows of one token first."""

    name: str
    lengths: tuple[int, ...]
    kv_lens: tuple[int, ...]

    @property
    def decodes_only(self) -> bool:
        return max(self.lengths) == 1

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Each row's tokens [start, end)."""
        return [(end - length, end) for length, end in zip(self.lengths, self.kv_lens)]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def decode_step(rows: int, mean: int) -> Step:
    """Rows amid their outputs, their lengths evenly spread around `mean`."""
    kv_lens = tuple(mean // 2 + (2 * row + 1) * mean // (2 * rows) for row in range(rows))
    return Step(f"decode {rows} × {sum(kv_lens) // rows}", (1,) * rows, kv_lens)


def prefill_step(prompts: int, length: int) -> Step:
    return Step(f"prefill {prompts} × {length}", (length,) * prompts, (length,) * prompts)


def ragged_step(prompts: int, mean: int) -> Step:
    """Prompts of about half the mean to one and a half times of it, which begin and end at any offset to tiles."""
    lengths = [mean + (-1) ** row * (row // 2 % (mean // 2)) for row in range(prompts)]
    random.Random(0).shuffle(lengths)
    return Step(f"prefill {prompts} × {min(lengths)} to {max(lengths)}", tuple(lengths), tuple(lengths))


class Engine:
    """What an engine with default options would compile for a case."""

    def __init__(self, case: Case):
        hf: dict[str, Any] = dict(MODEL_SHAPES[case.model])
        if case.layers is not None:
            hf["num_hidden_layers"] = case.layers
        self.case, self.chip = case, chip_named(case.chip)
        self.described: Model = read_model(case.model, hf, "bfloat16")
        config = EngineConfig(model=case.model, tensor_parallel_size=case.tensor)
        self.fit: Fit = fit(self.described, self.chip, config, data=1, tensor=case.tensor)
        family = model_class(hf)
        parsed = family.parse_config(hf).for_length(self.fit.scheduler.max_model_len).for_shards(case.tensor)
        self.model = family(parsed, dtype=jnp.dtype(jnp.bfloat16))
        self.plan = EnginePlan(
            jnp.dtype(jnp.bfloat16),
            "tpu",
            self.fit.scheduler,
            self.fit.decode_rungs,
            self.fit.groups,
            self.model.layer_caches(),
            self.fit.budget.weights,
            self.fit.cache_bytes,
        )
        self.shape = StepShape(
            layout_of(self.plan),
            self.plan.page_size,
            "tpu",
            jax.tree.structure(self.model),
            parsed.vocab_size,
            case.tensor,
        )

    @functools.cached_property
    def cost(self):
        """The model's own, on one device."""
        return clock(self.described, self.chip, None, self.case.tensor).cost

    def compile(self, key: Any):
        """(compiled, lowering) of one executable."""
        shape = (1, 1, self.case.tensor)
        with compiling_for(self.case.chip, shape, (DATA, EXPERT, TENSOR), self.case.topology) as mesh:
            lowering = Lowering(self.shape, self.plan, abstract_leaves(self.model, mesh), mesh)
            return lowering(key).compile(), lowering

    def traffic(self, step: Step) -> dict[str, tpu_traffic.Traffic]:
        """Of each kernel in one layer."""
        layer = self.plan.layers[0]
        lanes = 2 * layer.head_dim
        heads = self.model.config.num_attention_heads // self.case.tensor
        problem = tpu_sizes.Problem(
            step.num_tokens,
            layer.num_kv_heads,
            heads // layer.num_kv_heads,
            self.plan.page_size,
            -(-self.plan.scheduler.max_model_len // self.plan.page_size),
            max(layer.head_dim, tpu_sizes.LANES),
            lanes,
            2,
            2,
        )
        found = tpu_traffic.of_step(self.case.chip, problem, step.lengths, step.kv_lens, decodes_only=step.decodes_only)
        hidden, columns = self.model.config.hidden_size, self.model.config.intermediate_size // self.case.tensor
        if not step.decodes_only:
            # Counted even where all of them are in VMEM, as the cache never is.
            leading = sum(length == 1 for length in step.lengths)
            found["ragged_paged_decode"] += tpu_traffic.Traffic(tpu_traffic.decode_operands(problem, leading))
        elif tpu_sizes.chips()[self.case.chip].keeps_results:
            return found  # XLA multiplies
        described = Heads(heads, layer.num_kv_heads, layer.head_dim)
        fused = qkv_projection.gains(self.case.chip) and qkv_projection.traffic(
            step.num_tokens, hidden, described, 2, self.case.chip
        )
        if fused:
            found[f"qkv_projection_{step.num_tokens}"] = fused
        found["qk_norm_rope"] = tpu_traffic.Traffic(0, 0, 0)  # pages through nothing, multiplies nothing
        for rows in (step.num_tokens, self.plan.scheduler.max_num_seqs):
            if gated := gated_matmul.traffic(rows, hidden, columns, 2, self.case.chip):
                found[f"gated_matmul_{rows}"] = gated
        return found

    def sampler_traffic(self, rows: int) -> dict[str, tpu_traffic.Traffic]:
        """Likewise of the sampler."""
        cost = self.cost
        hidden = self.model.config.hidden_size
        found = argmax_projection.traffic(rows, hidden, cost.head_weights // hidden, self.case.chip)
        return {} if found is None else {f"argmax_projection_{rows}": found}

    def is_streamed(self, kernel: str, dims: tuple[int, ...]) -> bool:
        """Whether `traffic` says what this kernel moves of arrays of this shape, but for the cache."""
        layer, config = self.plan.layers[0], self.model.config
        queries = config.num_attention_heads // self.case.tensor
        if kernel == "ragged_paged_decode":
            lanes = max(layer.head_dim, tpu_sizes.LANES)
            of_mixed = len(dims) == 3 and dims[1] > self.plan.scheduler.max_num_seqs  # of decodes it takes all
            return of_mixed and dims[::2] in ((queries, lanes), (layer.num_kv_heads, 2 * layer.head_dim))
        gate_up = (config.hidden_size, 2 * config.intermediate_size // self.case.tensor)
        return dims in (gate_up, (config.hidden_size, (queries + 2 * layer.num_kv_heads) * layer.head_dim))

    def minimum(self, step: Step) -> Work:
        """What the model needs for it, on one device: weights, keys and values."""
        if step.decodes_only:
            return self.cost.decode(step.kv_lens)
        return self.cost.prefill(step.spans, len(step.lengths))

    def minimum_with_activations(self, step: Step) -> Work:
        """`minimum` with what activations need besides."""
        if step.decodes_only:
            shards, chip = self.case.tensor, self.chip
            arrays = Activations.of(self.described.config, step.num_tokens, self.cost.itemsize, shards)
            return self.minimum(step) + Work(arrays.least_bytes(chip.on_chip))
        return least_prefill(
            self.cost,
            self.described.config,
            step.spans,
            len(step.lengths),
            shards=self.case.tensor,
            on_chip=self.chip.on_chip,
        )

    def sum_shape(self, step: Step) -> tuple[int, int]:
        """What each collective of the forward pass sums."""
        return step.num_tokens, self.model.config.hidden_size


@dataclasses.dataclass(frozen=True)
class Program:
    """One executable as it was compiled, on one device.

    Attributes:
      count: what it costs, but for `filler_flops`.
      filler_flops: what the decode kernel multiplies with other heads' keys, see `tpu_traffic.Traffic`.
      minimum: what the model needs.
      argument_bytes, aliased_bytes: what XLA allots to arguments, and which of them it returns in place.
      temporary_bytes: what it allots besides, code included.
      collectives: how many of each, as "kind type[shape]".
      copies: instructions that copy a weight or a cache.
      vmem: bytes of VMEM that each kernel takes.
    """

    count: hlo_cost.Count
    filler_flops: float
    minimum: Work
    argument_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    collectives: Counter[str]
    copies: tuple[str, ...]
    vmem: dict[str, int]

    @property
    def bytes(self) -> float:
        """Without those that are fetched for the next run of the same program: this run's own were fetched so too."""
        return self.count.work.bytes - self.count.prefetched

    @property
    def flops(self) -> float:
        """Without fillers."""
        return self.count.work.flops

    @property
    def with_fillers(self) -> Work:
        return Work(self.bytes, self.flops + self.filler_flops)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A step of the engine: its forward pass and its greedy sampler."""

    engine: Engine
    step: Step
    forward: Program
    sample: Program

    @property
    def work(self) -> Work:
        """Without fillers."""
        return Work(self.forward.bytes + self.sample.bytes, self.forward.flops + self.sample.flops)

    @property
    def with_fillers(self) -> Work:
        return self.forward.with_fillers + self.sample.with_fillers

    @property
    def minimum(self) -> Work:
        """Of weights, keys and values."""
        return self.forward.minimum + self.sample.minimum

    @property
    def minimum_with_activations(self) -> Work:
        """`minimum`, which is weights, keys and values, and what activations must move besides."""
        return self.engine.minimum_with_activations(self.step)

    @property
    def fits(self) -> bool:
        most = max(each.argument_bytes + each.temporary_bytes for each in (self.forward, self.sample))
        return most <= self.engine.chip.device_limit(1)

    @property
    def least_time_ratio(self) -> float:
        """Of the times at the chip's published rates, fillers included."""
        ceilings: Ceilings = self.engine.chip.ceilings
        return ceilings.seconds(self.with_fillers) / ceilings.seconds(self.minimum)


def _named(found: list[hlo_cost.Collective]) -> Counter[str]:
    return Counter(
        each.kind + "".join(f" {shape.dtype}[{','.join(map(str, shape.dims))}]" for shape in each.shapes)
        for each in found
    )


def measure(engine: Engine, step: Step) -> Measured:
    """Compiles a step's two executables and counts them."""
    rungs = row_rungs(engine.plan.scheduler.max_num_seqs, engine.plan.decode_rungs)
    rows = next(rung for rung in rungs if rung >= len(step.lengths))
    whole, head = engine.minimum(step), engine.cost.head_weights
    logits = Work(head * engine.cost.itemsize, 2 * len(step.lengths) * head)
    forward = Work(whole.bytes - logits.bytes, whole.flops - logits.flops)
    return Measured(
        engine,
        step,
        _program(engine, Forward(step.num_tokens, step.decodes_only), forward, engine.traffic(step)),
        _program(engine, Sample(rows, GREEDY), logits, engine.sampler_traffic(rows)),
    )


def _program(engine: Engine, key: Any, minimum: Work, traffic: dict[str, tpu_traffic.Traffic]) -> Program:
    compiled, lowering = engine.compile(key)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    module = hlo.parse(text)
    cache = lowering.caches()[0]
    pages = cache.sharding.shard_shape(cache.shape)
    entry = module[module.entry]
    shapes = {leaf.sharding.shard_shape(leaf.shape) for leaf in lowering.leaves if leaf.size >= 1_000_000} | {pages}
    large = [number for number, name in enumerate(entry.parameters) if entry[name].shape.dims in shapes]
    return Program(
        hlo_cost.count(
            module,
            kernels={name: Work(each.read + each.written, each.flops) for name, each in traffic.items()},
            is_paged=lambda kernel, shape: shape.dims == pages or engine.is_streamed(kernel, shape.dims),
        ),
        sum(each.filler_flops for each in traffic.values()) * len(engine.plan.layers),
        minimum,
        memory.argument_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        _named(hlo_cost.collectives(module)),
        tuple(hlo_cost.copies(module, large)),
        kernel_vmem(text),
    )


def unnamed(found: Measured) -> list[str]:
    """Collectives of a greedy step that ARCHITECTURE.md does not name, and those that it names and that are missing."""
    engine = found.engine
    forward: Counter[str] = Counter()
    if engine.case.tensor > 1:
        width, slots = engine.model.config.hidden_size, engine.plan.scheduler.max_num_seqs
        last = found.step.num_tokens if found.step.decodes_only else min(slots, found.step.num_tokens)
        forward[f"all-reduce bf16[{found.step.num_tokens},{width}]"] += 2 * len(engine.plan.layers) - 1
        forward[f"all-reduce bf16[{last},{width}]"] += 2  # after its attention the last layer has each row's last token
    gathers = 1 if engine.case.tensor > 1 else 0  # of small ones XLA makes a sum
    wrong = [
        f"{name}: {found.forward.collectives[name]} instead of {forward[name]}"
        for name in (forward | found.forward.collectives)
        if found.forward.collectives[name] != forward[name]
    ]
    if sum(found.sample.collectives.values()) != gathers:
        wrong.append(f"sampler: {dict(found.sample.collectives)} instead of {gathers} gather")
    return wrong

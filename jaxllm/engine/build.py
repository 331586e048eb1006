"""From options to a running engine core. The steps that take seconds overlap: imports, compilation, weights."""

import contextlib
import dataclasses
import logging
import os
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.checkpoint import Checkpoint, open_checkpoint
from jaxllm.checkpoint.orbax_source import OrbaxCheckpoint
from jaxllm.checkpoint.safetensors_source import SafetensorsCheckpoint
from jaxllm.config import EngineConfig
from jaxllm.core.expected import Expected
from jaxllm.engine import autotuning, platform
from jaxllm.engine.compile import Executables, use_compilation_cache
from jaxllm.engine.core import EngineCore
from jaxllm.engine.device import Device
from jaxllm.engine.executable_store import ExecutableStore, fingerprint
from jaxllm.engine.executables import Forward, Sample, Stage, row_rungs, smallest_decode
from jaxllm.engine.gpu_memory import out_of_reach
from jaxllm.engine.group import Follower, Group, Leader, join
from jaxllm.engine.lowering_process import SharedLowering
from jaxllm.engine.resolve import EnginePlan, plan_engine, resolve_dtype
from jaxllm.engine.runner import Runner, layout_of
from jaxllm.engine.sampling import cover, variant_for
from jaxllm.engine.shared_device import SharedDevice, follow
from jaxllm.engine.step import StepShape
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.models import loader
from jaxllm.models.config import DecoderConfig
from jaxllm.models.registry import model_class
from jaxllm.structured.vocabulary import Encode, Vocabulary, vocabulary_of
from jaxllm.text.eos import eos_token_ids
from sharding import TENSOR, make_mesh, partition_spec, spans_processes

logger = logging.getLogger(__name__)


def first_keys(plan: EnginePlan, expected: Expected) -> list[Any]:
    """What such a first request needs: a prefill, a decode and a sampler."""
    rungs = plan.scheduler.token_rungs
    variant = cover(variant_for([expected.params] if expected.params else []))
    prefill = next((rung for rung in rungs if rung >= expected.prompt_length), rungs[-1])
    return [
        Stage(),
        Forward(prefill),
        smallest_decode(plan),
        Sample(row_rungs(plan.scheduler.max_num_seqs, plan.decode_rungs)[0], variant),
    ]


def _load(config: EngineConfig, model: nnx.Module, checkpoint: Checkpoint, mesh: Mesh, progress: bool) -> None:
    def shardings(axes: tuple[str | None, ...]) -> NamedSharding:
        return sharding_of(mesh, axes)

    if config.load_format == "dummy":
        loader.load_dummy(model, seed=config.seed, shardings=shardings)
        return
    if config.load_format == "orbax" and not isinstance(checkpoint, OrbaxCheckpoint):
        raise CheckpointError(f"load_format='orbax': {checkpoint.path} was not written by jaxllm convert")
    if config.load_format == "safetensors" and not isinstance(checkpoint, SafetensorsCheckpoint):
        raise CheckpointError(f"load_format='safetensors': {checkpoint.path} is no Hugging Face directory")
    with loader.progress_bar() if progress else contextlib.nullcontext() as on_progress:
        loader.load(model, checkpoint, shardings=shardings, on_progress=on_progress)
    checkpoint.release_memory()
    platform.trim_memory()


def sharding_of(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """Where a parameter with these logical axes lives."""
    spec = partition_spec(axes)
    return NamedSharding(mesh, spec if any(mesh.shape[name] > 1 for name in spec if name) else PartitionSpec())


def lowering_processes(plan: EnginePlan, threads: int) -> int:
    """Other processes that lower with this one; only Mosaic GPU's kernels take so long that they are worth it."""
    return threads - 1 if plan.backend == "gpu" else 0


def abstract_leaves(model: nnx.Module, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """The model's parameters in the order of its leaves, with their places on the mesh."""
    parameters = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Param))
    return [
        jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding_of(mesh, p.get_metadata()["axes"])) for p in parameters
    ]


def _mesh(config: EngineConfig, model: DecoderConfig, group: Group | None) -> Mesh:
    """The mesh that is asked for.

    Raises:
      ConfigError: the model does not divide over it, or the devices do not make it up; it names the meshes that would
        do.
    """
    count = len(jax.devices())
    if group is None:
        most = ", ".join(f"{count // size} × {size}" for size in model.shard_counts if size <= count)
        would_do = f"data × tensor may be at most {most}"
    else:
        would_do = ", ".join(f"{data} × {tensor}" for data, tensor in model.meshes(count))
    try:
        model.for_shards(config.tensor_parallel_size)
    except ConfigError as error:
        raise ConfigError(f"{error}; on {count} device{'s' * (count > 1)} {would_do}") from error
    if config.num_devices > count or (group is not None and config.num_devices < count):
        sizes = {name: getattr(config, name) for name in ("data_parallel_size", "tensor_parallel_size")}
        asked = " times ".join(f"{name}={size}" for name, size in sizes.items() if size > 1 or group is not None)
        if group is None:
            raise ConfigError(f"{asked}: there are {count} devices; {would_do}")
        raise ConfigError(f"{asked}: {group.size} processes have {count} devices, and all must be used: {would_do}")
    return make_mesh(data=config.data_parallel_size, tensor=config.tensor_parallel_size)


def stream_axis(mesh: Mesh, backend: str, config: EngineConfig) -> str | None:
    """The axis over whose shards the residual stream may be dealt out: kernels sum over the GPUs of one process, which
    reach each other's memory; the log says where they do not. Only meshes that are all one axis have been run."""
    kernels = backend == "gpu" and not config.disable_custom_all_reduce
    if not kernels or not 1 < mesh.shape[TENSOR] == mesh.size or spans_processes(mesh):
        return None
    apart = out_of_reach(list(mesh.devices.flat))
    if apart is not None:
        logger.warning("GPUs %d and %d cannot reach each other's memory: NCCL sums over tensor-parallel shards", *apart)
        return None
    return TENSOR


def build_core(
    config: EngineConfig,
    checkpoint: Checkpoint | None = None,
    *,
    expected: Expected | None = None,
    progress: bool = False,
) -> EngineCore:
    """Opens the model, plans memory, compiles the first executables while the weights load.

    Args:
      checkpoint: already opened, or None to open `config.model`.
      expected: the first request, whose executables are compiled first.
      progress: show a progress bar of the weights.

    Of several processes that are to run the engine (`coordinator_address`) all call this. It returns in process 0,
    whose core schedules; in the others it launches what process 0 launches, and ends with SystemExit when that one
    closes the engine.

    Raises what `join`, `open_checkpoint`, `plan_engine` and the loader raise; in all processes if in one.
    """
    platform.configure(config.num_devices)
    group = join(config)
    try:
        core = _build(config, checkpoint, expected, progress, group)
        if isinstance(group, Follower):
            follow(group, core.runner.device)
    except BaseException as error:
        if group is not None:
            group.close(f"{type(error).__name__}: {error}")
        raise
    if isinstance(group, Follower):
        raise SystemExit(0)
    return core


def _build(
    config: EngineConfig,
    checkpoint: Checkpoint | None,
    expected: Expected | None,
    progress: bool,
    group: Leader | Follower | None,
) -> EngineCore:
    use_compilation_cache(config.cache_directory)
    checkpoint = checkpoint or open_checkpoint(config.model, config.revision, weights=config.load_format != "dummy")
    family = model_class(checkpoint.config)
    dtype = resolve_dtype(config)
    expected = expected or Expected()
    parsed = family.parse_config(checkpoint.config)
    if config.max_model_len is None and expected.longest is not None:
        config = dataclasses.replace(config, max_model_len=min(expected.longest, parsed.max_position_embeddings))
    if group is not None:
        group.agree_on_options(config)
        group.agree_on("a config.json", repr(parsed))
    parsed = parsed.for_length(config.max_model_len or parsed.max_position_embeddings)
    mesh = _mesh(config, parsed, group)
    model = family(parsed.for_shards(config.tensor_parallel_size), dtype=dtype)
    plan = plan_engine(config, model, least=int if group is None else group.least)
    if group is not None:
        group.agree_on("sizes", repr(plan))
    shape = StepShape(
        layout_of(plan),
        plan.page_size,
        plan.backend,
        jax.tree.structure(model),
        model.config.vocab_size,
        model.config.tensor_shards,
        stream_axis(mesh, plan.backend, config),
    )
    autotuning.seed(config.cache_directory, jax.devices()[0].device_kind)
    threads = max(2, min(8, (os.cpu_count() or 2) // 2))
    others = lowering_processes(plan, threads)
    lowering = SharedLowering(shape, plan, abstract_leaves(model, mesh), mesh, others)
    store = None
    if jax.default_backend() != "cpu":  # where lowering costs seconds
        name = fingerprint(
            family.__name__, model.config, plan, shape.layout, shape.stream_axis, mesh.shape, jax.process_index()
        )
        store = (ExecutableStore(config.cache_directory, name), list(mesh.devices.flat))
    executables = Executables(lowering, num_threads=threads, store=store)
    executables.prepare(first_keys(plan, expected))
    _load(config, model, checkpoint, mesh, progress)
    leaves = jax.tree.leaves(model)
    parts = (mesh, leaves, executables, lowering)
    device = SharedDevice(group, *parts) if isinstance(group, Leader) else Device(*parts)
    if group is not None:
        group.exchange("loaded")  # process 0 is ready when all are
    runner = Runner(plan, shape, device, lowering.ranks)
    vocab_size = model.config.vocab_size

    def load_vocabulary() -> tuple[Vocabulary, Encode]:
        tokenizer = checkpoint.tokenizer()
        eos = eos_token_ids(checkpoint.config, checkpoint.generation_config, tokenizer)
        vocabulary = vocabulary_of(tokenizer, vocab_size, frozenset(token for token in eos if token < vocab_size))
        return vocabulary, lambda text: tokenizer.encode(text, add_special_tokens=False)

    return EngineCore(
        runner,
        enable_prefix_caching=config.enable_prefix_caching,
        warm_up=config.warm_up,
        load_vocabulary=load_vocabulary,
    )

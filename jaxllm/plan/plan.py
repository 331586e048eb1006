"""The plan: which meshes of so many chips hold a model, what each gives, and which is best."""

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from jaxllm.config import EngineConfig
from jaxllm.core.kv_cache import CacheGroup, cdiv
from jaxllm.errors import ConfigError, InvalidRequestError, OutOfMemoryError
from jaxllm.plan.chips import Calibration, Chip
from jaxllm.plan.fit import Fit, Model, clock, fit, tensor_sizes
from jaxllm.plan.times import Clock, Step


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds, at least and as calibrated; None where nothing was measured."""

    floor: float
    predicted: float | None

    @property
    def best(self) -> float:
        """What meshes are compared by."""
        return self.floor if self.predicted is None else self.predicted


@dataclasses.dataclass(frozen=True)
class BatchTimes:
    """So many requests at once on the whole mesh, all prompts there at the start.

    Attributes:
      requests: how many.
      ttft: until every one has its first token.
      tpot: of one step of all, in the middle of their outputs.
      output_tok_s: output tokens a second from the first prompt token to the last output token, of the whole mesh.
    """

    requests: int
    ttft: Times
    tpot: Times
    output_tok_s: Times


@dataclasses.dataclass(frozen=True)
class WorkloadTimes:
    """All requests of a workload at once.

    Attributes:
      steps: of the rank that takes most.
      seconds: of that rank; ranks step together.
    """

    workload: str
    output_tokens: int
    steps: int
    seconds: Times


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """A mesh that holds the model.

    Attributes:
      weight_bytes, step_bytes, table_bytes, cache_bytes: of one device; `device_limit` of it JAX may use.
      groups: the cache groups of a rank.
      cache_tokens: that all ranks' caches hold together.
      max_model_len: tokens of the longest request.
      max_requests: such requests as the plan is for, at once.
      batches: by number of requests; empty if not one fits.
    """

    data: int
    tensor: int
    device_limit: int
    weight_bytes: int
    step_bytes: int
    table_bytes: int
    cache_bytes: int
    groups: tuple[CacheGroup, ...]
    cache_tokens: int
    max_model_len: int
    max_requests: int
    batches: tuple[BatchTimes, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `jaxllm plan` says.

    Attributes:
      chips: how many; `devices` of JAX.
      context, output_len: prompt and output tokens of each request.
      meshes: those that fit, by tensor shards.
      refused: why each other does not, by its name such as "2 × 4".
      throughput, latency: the mesh of the most output tokens a second, and that of the least time a token of a single
        request, by prediction or else by floor.
    """

    model: str
    dtype: str
    chip: Chip
    calibration: Calibration | None
    chips: int
    devices: int
    context: int
    output_len: int
    meshes: tuple[MeshPlan, ...]
    refused: dict[str, str]
    throughput: MeshPlan
    latency: MeshPlan


def mesh_name(data: int, tensor: int) -> str:
    return f"{data} × {tensor}"


def meshes(
    model: Model, chip: Chip, chips: int, *, data: int | None = None, tensor: int | None = None
) -> list[tuple[int, int]]:
    """(data, tensor) over the devices of so many chips, tensor shards within one domain of the fast interconnect.

    Without sizes given, every size of shards that divides the model, with as many ranks as there is room for: some
    devices may stay idle.

    Raises:
      ConfigError: a size given does not divide the devices or the model, or leaves the domain; it names the meshes
        that would do.
    """
    devices, joined = chips * chip.devices, chip.domain * chip.devices
    if data is None and tensor is None:
        return [(devices // size, size) for size in tensor_sizes(model.config, min(devices, joined))]
    given = [f"{name}={size}" for name, size in (("data", data), ("tensor", tensor)) if size is not None]
    text = " and ".join(each.replace("=", "_parallel_size=") for each in given)
    fitting = ", ".join(mesh_name(*mesh) for mesh in model.config.meshes(devices) if mesh[1] <= joined)
    would_do = f"data × tensor may be {fitting}"
    if devices % (data or 1) or devices % (tensor or 1) or (data and tensor and data * tensor != devices):
        raise ConfigError(f"{text}: must make up the {devices} devices of {chips} × {chip.name}; {would_do}")
    shards = tensor or devices // (data or 1)
    if shards > joined:
        raise ConfigError(
            f"tensor_parallel_size={shards}: {chip.topology} joins {joined} devices of {chip.name} at most; {would_do}"
        )
    try:
        model.config.for_shards(shards)
    except ConfigError as error:
        raise ConfigError(f"{error}; on {chips} × {chip.name} {would_do}") from error
    return [(devices // shards, shards)]


def make_plan(
    model: Model,
    chip: Chip,
    config: EngineConfig,
    calibration: Calibration | None,
    *,
    chips: int = 1,
    data: int | None = None,
    tensor: int | None = None,
    context: int = 1024,
    output_len: int = 128,
) -> Plan:
    """Plans a model on so many chips, over every mesh or the one that is given.

    Raises:
      ConfigError: options that do not fit the model, the chips or each other.
      InvalidRequestError: requests that are longer than the model takes.
      OutOfMemoryError: no mesh holds the model: the message tells the sum, and how many chips would do.
    """
    limit = config.max_model_len or model.config.max_position_embeddings
    if context + output_len > limit:
        raise InvalidRequestError("context", context, f"with {output_len} output tokens must be {limit} at most")
    found: list[MeshPlan] = []
    refused: dict[str, str] = {}
    for ranks, shards in meshes(model, chip, chips, data=data, tensor=tensor):
        try:
            fitted = fit(model, chip, config, data=ranks, tensor=shards)
        except OutOfMemoryError as error:
            refused[mesh_name(ranks, shards)] = str(error)
            continue
        found.append(_mesh_plan(fitted, clock(model, chip, calibration, shards), context, output_len))
    able = [mesh for mesh in found if mesh.batches]
    if not able:
        reason = list(refused.values())[-1] if refused else f"the cache of {found[-1].cache_tokens} tokens is too small"
        raise OutOfMemoryError(
            f"{model.name} with requests of {context} + {output_len} tokens does not fit on {chips} × {chip.name}: "
            f"{reason}. {_what_would_do(model, chip, config, context + output_len, chips)}"
        )
    return Plan(
        model=model.name,
        dtype=model.dtype,
        chip=chip,
        calibration=calibration,
        chips=chips,
        devices=chips * chip.devices,
        context=context,
        output_len=output_len,
        meshes=tuple(found),
        refused=refused,
        throughput=max(able, key=lambda mesh: max(batch.output_tok_s.best for batch in mesh.batches)),
        latency=min(able, key=lambda mesh: mesh.batches[0].tpot.best),
    )


def chips_needed(model: Model, chip: Chip, config: EngineConfig, num_tokens: int) -> int | None:
    """The fewest chips on which one request of so many tokens runs; None: more than tensor shards can join."""
    for shards in tensor_sizes(model.config, chip.domain * chip.devices):
        if shards > 1 and shards % chip.devices:
            continue  # a part of a chip would lie idle
        ranks = chip.devices if shards < chip.devices else 1
        try:
            if fit(model, chip, config, data=ranks, tensor=shards).requests(num_tokens):
                return ranks * shards // chip.devices
        except OutOfMemoryError:
            continue
    return None


def _what_would_do(model: Model, chip: Chip, config: EngineConfig, num_tokens: int, chips: int) -> str:
    needed = chips_needed(model, chip, config, num_tokens)
    if needed is None:
        most = tensor_sizes(model.config, chip.domain * chip.devices)[-1]
        return f"No number of chips would do: tensor_parallel_size is {most} at most"
    if needed <= chips:
        shards = needed * chip.devices
        return f"With tensor_parallel_size={shards} it would fit"
    return f"{needed} chips would do (tensor_parallel_size={needed * chip.devices})"


def _mesh_plan(fitted: Fit, clock: Clock, context: int, output_len: int) -> MeshPlan:
    most = fitted.requests(context + output_len)
    sizes = [fitted.data * 4**power for power in range(12)]
    counts = sorted({1, *(size for size in sizes if size < most), most}) if most else []
    return MeshPlan(
        data=fitted.data,
        tensor=fitted.tensor,
        device_limit=fitted.budget.limit,
        weight_bytes=fitted.budget.weights,
        step_bytes=fitted.budget.step,
        table_bytes=fitted.budget.tables,
        cache_bytes=fitted.cache_bytes,
        groups=fitted.groups,
        cache_tokens=fitted.cache_tokens,
        max_model_len=fitted.scheduler.max_model_len,
        max_requests=most,
        batches=tuple(_batch(fitted, clock, count, context, output_len) for count in counts),
    )


def _batch(fitted: Fit, clock: Clock, count: int, context: int, output_len: int) -> BatchTimes:
    """Times of the rank with the most requests, which all others wait for."""
    own = cdiv(count, fitted.data)
    whole = Step(spans=[(0, context)] * own, num_sampled=own)
    parts = list(prompt_steps(own, context, fitted.scheduler.token_rungs))
    rungs = fitted.decode_rungs or fitted.scheduler.token_rungs
    middle = context + max(1, output_len // 2)
    decode = Step(contexts=[middle] * own, num_sampled=own, num_padded=rungs[bisect_left(rungs, own)])
    prompts = _sum([clock.predict_admission(count * context), *(clock.predict(step) for step in parts)])
    ttft = Times(clock.floor(whole), prompts)
    tpot = Times(clock.floor(decode), clock.predict(decode))

    def speed(first: float, each: float) -> float:
        return count * output_len / (first + (output_len - 1) * each)

    predicted = None
    if ttft.predicted is not None and tpot.predicted is not None:
        predicted = speed(ttft.predicted, tpot.predicted)
    return BatchTimes(count, ttft, tpot, Times(speed(ttft.floor, tpot.floor), predicted))


def prompt_steps(count: int, length: int, rungs: Sequence[int]) -> Iterator[Step]:
    """The steps that compute `count` prompts of so many tokens, one after another, cut to the largest step."""
    spans: list[tuple[int, int]] = []
    room = rungs[-1]
    for number in range(count):
        start = 0
        while start < length:
            part = min(room, length - start)
            spans.append((start, start + part))
            start, room = start + part, room - part
            if room == 0 or (number == count - 1 and start == length):
                total = rungs[-1] - room
                sampled = sum(end == length for _, end in spans)
                yield Step(spans, num_sampled=sampled, num_padded=rungs[bisect_left(rungs, total)])
                spans, room = [], rungs[-1]


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None

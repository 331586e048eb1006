"""A plan on a terminal: tables, bars of memory and of speed; and as JSON."""

import dataclasses
import json
import math
from typing import Any

import rich.table
from rich.console import Console

from jaxllm.plan.plan import MeshPlan, Plan, Times, WorkloadTimes, mesh_name

EIGHTHS = " ▏▎▍▌▋▊▉█"
WIDTH = 48  # characters of a full bar


def bar(share: float, width: int = WIDTH) -> str:
    """A horizontal bar of a share in [0, 1], to an eighth of a character."""
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()


def milliseconds(seconds: float | None) -> str:
    """To three figures or more; nothing for None and NaN."""
    if seconds is None or math.isnan(seconds):
        return ""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def count(value: float | None) -> str:
    """A rounded number, or nothing for None and NaN."""
    return "" if value is None or math.isnan(value) else f"{value:,.0f}"


def gigabytes(value: float) -> str:
    return f"{value / 1e9:,.2f}"


def print_plan(console: Console, plan: Plan, workloads: list[WorkloadTimes]) -> None:
    """The meshes, the memory of the best one, and its times by the number of requests."""
    chip, best = plan.chip, plan.throughput
    devices = "" if plan.devices == plan.chips else f" ({plan.devices} devices)"
    console.print(
        f"{plan.model} in {plan.dtype} on {plan.chips} × {chip.name}{devices}: fits", style="bold", highlight=False
    )
    console.print(
        f"Published: {chip.ceilings.bandwidth / 1e9:,.0f} GB/s and {chip.ceilings.flops / 1e12:,.0f} TFLOP/s a device, "
        f"{chip.topology}. Requests of {plan.context} + {plan.output_len} tokens, up to {best.max_model_len}.",
        highlight=False,
    )
    console.print(_meshes(plan))
    for name, reason in plan.refused.items():
        console.print(f"{name} does not fit: {reason}", style="dim", highlight=False, markup=False)
    console.print(_memory(best))
    console.print(_batches(plan, best))
    console.print(_speeds(best))
    if workloads:
        console.print(_workloads(workloads))
    for note in notes(plan):
        console.print(note, style="dim", highlight=False, markup=False)


def notes(plan: Plan) -> list[str]:
    """What the columns mean."""
    found = [
        "Floor: bytes over the published bandwidth or FLOPs over the published rate, whichever takes longer, and the "
        "sums over tensor shards at the links' speed.",
        "TTFT: until all of so many prompts, there at once, have their first token. TPOT: one step of them all in the "
        f"middle of {plan.output_len} outputs. tok/s: output tokens over both.",
    ]
    if plan.calibration is None:
        found.append(
            f"No prediction: nothing of jaxllm was measured on {plan.chip.name} (--calibration FILE takes it)."
        )
    elif plan.dtype != "bfloat16":
        found.append(f"No prediction: {plan.chip.name} was measured in bfloat16.")
    elif plan.calibration.all_reduce_seconds is None and all(mesh.tensor > 1 for mesh in plan.meshes):
        found.append(f"No prediction: of {plan.chip.name} sums over tensor shards are not in its calibration.")
    else:
        found.append(f"Predicted: by what was measured on {plan.chip.name} ({plan.calibration.sources[0]}).")
    return found


def _table(title: str, *columns: str) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table


def _meshes(plan: Plan) -> rich.table.Table:
    table = _table(
        "Meshes", "data × tensor", "weights, GB", "cache, GB", "cache tokens", "requests", "TPOT of 1, floor",
        "predicted", "tok/s of most, floor", "predicted", "",
    )  # fmt: skip
    for mesh in plan.meshes:
        nothing = Times(math.nan, None)
        first, last = (mesh.batches[0].tpot, _fastest(mesh)) if mesh.batches else (nothing, nothing)
        marks = [text for text, best in (("most tok/s", plan.throughput), ("least TPOT", plan.latency)) if mesh is best]
        idle = plan.devices - mesh.data * mesh.tensor
        marks += [f"{idle} idle"] if idle else []
        table.add_row(
            mesh_name(mesh.data, mesh.tensor),
            gigabytes(mesh.weight_bytes),
            gigabytes(mesh.cache_bytes),
            count(mesh.cache_tokens),
            count(mesh.max_requests),
            milliseconds(first.floor),
            milliseconds(first.predicted),
            count(last.floor),
            count(last.predicted),
            ", ".join(marks),
        )
    return table


def _fastest(mesh: MeshPlan) -> Times:
    return max((batch.output_tok_s for batch in mesh.batches), key=lambda times: times.best)


def memory_parts(mesh: MeshPlan) -> list[tuple[str, int]]:
    """What lies in a device's memory, in bytes; the last is what JAX may use and the engine leaves alone."""
    parts = [
        ("weights", mesh.weight_bytes),
        ("largest step", mesh.step_bytes),
        ("slots' tables", mesh.table_bytes),
        ("KV cache", mesh.cache_bytes),
    ]
    return [*parts, ("left alone", mesh.device_limit - sum(size for _, size in parts))]


def _memory(mesh: MeshPlan) -> rich.table.Table:
    title = f"Memory of a device, data × tensor = {mesh_name(mesh.data, mesh.tensor)}"
    table = _table(title, "", "GB", f"of {gigabytes(mesh.device_limit)} GB")
    table.columns[-1].justify = "left"
    for name, size in memory_parts(mesh):
        share = size / mesh.device_limit
        table.add_row(name, gigabytes(size), f"{bar(share)} {share:.1%}")
    return table


def _batches(plan: Plan, mesh: MeshPlan) -> rich.table.Table:
    table = _table(
        f"Times in milliseconds, data × tensor = {mesh_name(mesh.data, mesh.tensor)}",
        "requests at once", "TTFT floor", "predicted", "TPOT floor", "predicted", "tok/s floor", "predicted",
    )  # fmt: skip
    for batch in mesh.batches:
        table.add_row(
            count(batch.requests),
            *(milliseconds(value) for times in (batch.ttft, batch.tpot) for value in (times.floor, times.predicted)),
            count(batch.output_tok_s.floor),
            count(batch.output_tok_s.predicted),
        )
    return table


def _speeds(mesh: MeshPlan) -> rich.table.Table:
    """Bars: full as far as is predicted, light as far as the floor's speed goes."""
    most = max(batch.output_tok_s.floor for batch in mesh.batches)
    table = _table("Output tokens a second by requests at once", "requests", "█ predicted, ░ floor")
    table.columns[-1].justify = "left"
    for batch in mesh.batches:
        speed = batch.output_tok_s
        inner, whole = (round(WIDTH * (value or 0.0) / most) for value in (speed.predicted, speed.floor))
        told = f"{count(speed.predicted)} of {count(speed.floor)}" if speed.predicted else count(speed.floor)
        table.add_row(count(batch.requests), f"{'█' * inner}{'░' * (whole - inner)} {told}")
    return table


def _workloads(workloads: list[WorkloadTimes]) -> rich.table.Table:
    table = _table(
        "Workloads of jaxllm bench, through the engine's scheduler", "workload", "steps", "floor, s", "predicted, s",
        "tok/s floor", "predicted",
    )  # fmt: skip
    for each in workloads:
        seconds = each.seconds
        speed = seconds.predicted and each.output_tokens / seconds.predicted
        predicted = "" if seconds.predicted is None else f"{seconds.predicted:.3f}"
        floor = count(each.output_tokens / seconds.floor)
        table.add_row(each.workload, count(each.steps), f"{seconds.floor:.3f}", predicted, floor, count(speed))
    return table


def refusal_to_json(reason: str, chips_needed: int | None) -> str:
    """That nothing fits, why, and how many chips would do (null: none)."""
    return json.dumps({"fits": False, "reason": reason, "chips_needed": chips_needed}, indent=1)


def to_json(plan: Plan, workloads: list[WorkloadTimes]) -> str:
    """All of it: bytes, seconds and tokens a second. The best meshes are told by their sizes."""
    whole: dict[str, Any] = dataclasses.asdict(plan)
    for name in ("throughput", "latency"):
        mesh: MeshPlan = getattr(plan, name)
        whole[f"best_{name}"] = {"data": mesh.data, "tensor": mesh.tensor}
        del whole[name]
    return json.dumps({"fits": True, **whole, "workloads": [dataclasses.asdict(each) for each in workloads]}, indent=1)

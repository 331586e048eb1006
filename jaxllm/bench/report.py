"""Results as tables, JSON and plots."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxllm.bench import peers
from jaxllm.bench.latency import LatencyResult
from jaxllm.bench.models import model_name
from jaxllm.bench.serve import ServeResult
from jaxllm.bench.session import Session
from jaxllm.bench.throughput import ThroughputResult
from jaxllm.errors import ConfigError


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def console() -> Console:
    """One that is wide enough for the tables where its output goes to a file."""
    found = Console()
    return found if found.is_terminal else Console(width=max(found.width, 140))


def _sources(console: Console, engines: set[str]) -> None:
    for engine in sorted(engines):
        console.print(f"{engine}: {peers.source(engine)}", style="dim")


def print_session(console: Console, model: str, session: Session) -> None:
    """What was measured on."""
    ceilings = session.ceilings
    console.print(f"{model} in {session.dtype} on {session.num_devices} × {session.device}", style="bold")
    if ceilings is not None:
        console.print(
            f"measured ceilings: {ceilings.bandwidth / 1e9:,.0f} GB/s of memory, "
            f"{ceilings.flops / 1e12:,.2f} TFLOP/s of a GEMM"
        )
    console.print(f"ready in {session.start_seconds:.1f} s, everything compiled {session.warm_up_seconds:.1f} s later")


def print_throughput(console: Console, model: str, session: Session, results: Sequence[ThroughputResult]) -> None:
    """Each workload with the floor and with what other engines reached."""
    columns = (
        "workload",
        "seconds",
        "out tok/s",
        "total tok/s",
        "GB/s",
        "TFLOP/s",
        "of the floor",
        "padding",
        "late",
        "preempted",
    )
    table = _table("all requests at once", columns)
    for r in results:
        table.add_row(
            r.workload,
            f"{r.seconds:.3f}",
            _rate(r.output_tok_s),
            _rate(r.total_tok_s),
            f"{r.bandwidth / 1e9:,.1f}",
            f"{r.flops / 1e12:,.2f}",
            _share(r.floor_share),
            _share(r.padded_share),
            str(r.late_compilations),
            str(r.preemptions),
        )
    console.print(table)
    compared = _table(
        "other engines on the same work", ["workload", "engine", "out tok/s", "total tok/s", "ours / theirs"]
    )
    engines, ratios = set(), []
    for r in results:
        for figure in peers.figures(model_name(model), r.workload, session.device, session.num_devices):
            theirs, total = figure.get("output_tok_s"), figure.get("total_tok_s")
            ratio = ratio_to(r, figure)
            engines.add(figure["engine"])
            if figure["engine"].startswith("vLLM") and "fp8" not in figure["engine"]:
                ratios.append(ratio)
            compared.add_row(
                r.workload,
                figure["engine"],
                _rate(theirs) if theirs else "",
                _rate(total) if total else "",
                f"{ratio:.3f}",
            )
    if compared.row_count:
        console.print(compared)
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            console.print(f"geometric mean of ours / vLLM's over {len(ratios)} workloads: {mean:.3f}", style="bold")
        _sources(console, engines)


def ratio_to(result: ThroughputResult, figure: dict[str, Any]) -> float:
    """Our speed over a peer's: by seconds where known, else by tokens a second."""
    if "seconds" in figure:
        return figure["seconds"] / result.seconds
    if "output_tok_s" in figure:
        return result.output_tok_s / figure["output_tok_s"]
    return result.total_tok_s / figure["total_tok_s"]


def print_latency(console: Console, model: str, session: Session, results: Sequence[LatencyResult]) -> None:
    """Batch-1 figures in milliseconds."""
    columns = "in/out", "TTFT p50", "p99", "floor", "TPOT p50", "p99", "floor", "tok/s", "GB/s", "of the floor", "late"
    table = _table("one request at a time, milliseconds", columns)
    for r in results:
        table.add_row(
            f"{r.input_tokens}/{r.output_tokens}",
            f"{r.ttft_p50 * 1e3:.2f}",
            f"{r.ttft_p99 * 1e3:.2f}",
            "" if r.ttft_floor is None else f"{r.ttft_floor * 1e3:.2f}",
            f"{r.tpot_p50 * 1e3:.3f}",
            f"{r.tpot_p99 * 1e3:.3f}",
            "" if r.tpot_floor is None else f"{r.tpot_floor * 1e3:.3f}",
            _rate(r.decode_tok_s),
            f"{r.bandwidth / 1e9:,.1f}",
            _share(r.floor_share),
            str(r.late_compilations),
        )
    console.print(table)


_SERVE_COLUMNS = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "itl_p50", "itl_p99")


def print_serve(console: Console, model: str, device: str, num_devices: int, results: Sequence[ServeResult]) -> None:
    """Online figures in milliseconds, each rate's peers below it."""
    names = [name.upper().replace("_P", " p") for name in _SERVE_COLUMNS]
    table = _table("Poisson arrivals, milliseconds", ["requests/s", "engine", *names, "out tok/s", "late", "preempted"])
    engines = set()
    for r in results:
        ours = [f"{getattr(r, name) * 1e3:.2f}" for name in _SERVE_COLUMNS]
        late, preempted = f"{r.late_compilations:g}", f"{r.preemptions:g}"
        table.add_row(f"{r.rate:g}", "jaxllm", *ours, _rate(r.output_tok_s), late, preempted)
        for figure in peers.figures(model_name(model), "poisson_arrivals", device, num_devices, r.rate):
            engines.add(figure["engine"])
            theirs = [figure.get(f"{name}_ms") for name in _SERVE_COLUMNS]
            cells = [
                f"{value:.2f} ({getattr(r, name) * 1e3 / value:.2f}×)" if value else ""
                for name, value in zip(_SERVE_COLUMNS, theirs, strict=True)
            ]
            table.add_row("", figure["engine"], *cells, _rate(figure["output_tok_s"]), "", "")
    console.print(table)
    if engines:
        console.print("in brackets: our time over theirs", style="dim")
    _sources(console, engines)


def write_json(path: Path, command: str, model: str, facts: dict[str, Any], results: Sequence[Any]) -> None:
    """One object: command, model, the run's facts, and the results with their peers' figures."""
    entries = []
    for result in results:
        entry = dataclasses.asdict(result)
        name = entry.get("workload", "poisson_arrivals" if command == "serve" else "")
        device, count = facts.get("device", ""), facts.get("num_devices", 1)
        entry["peers"] = peers.figures(model_name(model), name, device, count, entry.get("rate"))
        entries.append(entry)
    path.write_text(json.dumps({"command": command, "model": model, **facts, "results": entries}, indent=1) + "\n")


def check_plot() -> None:
    """Raises ConfigError before any work if plots cannot be drawn here."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib")


def plot_throughput(path: Path, model: str, session: Session, results: Sequence[ThroughputResult]) -> None:
    """Each workload's speed as bars: ours, the peers', and the floor as a line at 100% (without one: ours is 100%)."""
    from matplotlib.figure import Figure

    by_engine: dict[str, list[tuple[int, float]]] = {"jaxllm": []}
    for number, r in enumerate(results):
        ours = 1.0 if r.floor_share is None else r.floor_share
        by_engine["jaxllm"].append((number, ours))
        for found in peers.figures(model_name(model), r.workload, session.device, session.num_devices):
            by_engine.setdefault(found["engine"], []).append((number, ours / ratio_to(r, found)))
    figure = Figure(figsize=(1.6 * len(results) + 3, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(by_engine)
    for number, (engine, bars) in enumerate(by_engine.items()):
        places = [at + (number - (len(by_engine) - 1) / 2) * width for at, _ in bars]
        drawn = axes.bar(places, [100 * share for _, share in bars], width, label=engine)
        speeds = [results[at].output_tok_s * share / dict(by_engine["jaxllm"])[at] for at, share in bars]
        axes.bar_label(drawn, [_rate(speed) for speed in speeds], fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(results)), [r.workload for r in results], rotation=20, ha="right")
    with_floor = results[0].floor_share is not None if results else False
    axes.set_ylabel("% of the floor's speed" if with_floor else "% of jaxllm's speed")
    axes.axhline(100, color="black", linewidth=0.8, linestyle="--", label="floor" if with_floor else None)
    axes.set_title(
        f"{model_name(model)}, {session.dtype}, {session.num_devices} × {session.device}; labels: output tok/s"
    )
    axes.margins(y=0.2)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_serve(path: Path, model: str, device: str, results: Sequence[ServeResult]) -> None:
    """TTFT, TPOT and ITL against the rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("ttft", "tpot", "itl"), strict=True):
        rates = [r.rate for r in results]
        for share, style in (("p50", "-o"), ("p99", "--o")):
            axes.plot(rates, [getattr(r, f"{name}_{share}") * 1e3 for r in results], style, label=f"jaxllm {share}")
            theirs: dict[str, list[tuple[float, float]]] = {}
            for rate in rates:
                for found in peers.figures(model_name(model), "poisson_arrivals", device, 1, rate):
                    if f"{name}_{share}_ms" in found:
                        theirs.setdefault(found["engine"], []).append((rate, found[f"{name}_{share}_ms"]))
            for engine, points in theirs.items():
                axes.plot(*zip(*points, strict=True), style.replace("o", "s"), label=f"{engine} {share}", alpha=0.6)
        axes.set_xlabel("requests/s")
        axes.set_ylabel(f"{name.upper()}, ms")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.suptitle(f"{model_name(model)}, {device}")
    figure.savefig(path, dpi=150)


def plot_latency(path: Path, model: str, session: Session, results: Sequence[LatencyResult]) -> None:
    """TTFT and TPOT beside their floors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("ttft", "tpot"), strict=True):
        labels = [f"{r.input_tokens}/{r.output_tokens}" for r in results]
        axes.bar(labels, [getattr(r, f"{name}_p50") * 1e3 for r in results], label="jaxllm p50")
        floors = [getattr(r, f"{name}_floor") for r in results]
        if all(floor is not None for floor in floors):
            axes.bar(labels, [floor * 1e3 for floor in floors], label="floor", width=0.5)
        axes.set_ylabel(f"{name.upper()}, ms")
        axes.legend()
    figure.suptitle(f"{model_name(model)}, {session.dtype}, {session.num_devices} × {session.device}; tokens in/out")
    figure.savefig(path, dpi=150)

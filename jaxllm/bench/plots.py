"""Results as plots; the kind of file follows the name's suffix."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.bench.facts import Facts
from jaxllm.bench.latency import LatencyResult
from jaxllm.bench.results import Part
from jaxllm.bench.serve import RateResult
from jaxllm.bench.tables import peers_of, ratio_to, speed
from jaxllm.bench.throughput import ThroughputResult
from jaxllm.errors import ConfigError

COLORS = {"jaxllm": "#1b6ca8", "vLLM 0.24.0": "#e08e0b", "transformers 5.17": "#7a7a7a"}


def check_plot() -> None:
    """Raises ConfigError before any work if plots cannot be drawn here."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'jaxllm[bench]'")


def plot_part(path: Path, part: Part) -> bool:
    """Draws a part's results to a file, if they are of a kind that is drawn; whether they were."""
    draw: dict[str, Any] = {"throughput": throughput, "serve": serve, "latency": latency}
    if part.part not in draw or not part.results:
        return False
    import matplotlib

    # Text as text keeps SVG files small and readable; a fixed salt and no date make equal data equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxllm"}):
        figure = draw[part.part](part.facts, part.results)
        options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 150}
        figure.savefig(path, **options)
    return True


def _title(facts: Facts) -> str:
    return f"{facts.model}, {facts.dtype}, {facts.num_devices} × {facts.device}"


def throughput(facts: Facts, results: Sequence[ThroughputResult]) -> Any:
    """Each workload's speed as bars: ours, the peers', and the floor as a line at 100% (without one: ours is 100%)."""
    from matplotlib.figure import Figure

    with_floor = all(r.floor_share is not None for r in results)
    by_engine: dict[str, list[tuple[int, float, float]]] = {"jaxllm": []}  # workload's number, share, tokens a second
    for number, r in enumerate(results):
        ours = r.floor_share if with_floor and r.floor_share is not None else 1.0
        by_engine["jaxllm"].append((number, ours, r.output_tok_s))
        for engine, found in peers_of(facts, r.workload).items():
            ratio = ratio_to(r, found)
            by_engine.setdefault(engine, []).append((number, ours / ratio, r.output_tok_s / ratio))
    figure = Figure(figsize=(1.3 * len(results) + 2.5, 4.5), layout="constrained")
    axes = figure.subplots()
    beside = [[engine for engine, bars in by_engine.items() if number in {at for at, *_ in bars}]
              for number in range(len(results))]  # fmt: skip
    width = 0.84 / max(map(len, beside))
    for engine, bars in by_engine.items():
        places = [at + (beside[at].index(engine) - (len(beside[at]) - 1) / 2) * width for at, *_ in bars]
        heights = [100 * share for _, share, _ in bars]
        drawn = axes.bar(places, heights, width, label=engine, color=COLORS.get(engine))
        axes.bar_label(drawn, [speed(value) for *_, value in bars], fontsize=7, rotation=90, padding=3)
    axes.set_xticks(range(len(results)), [r.workload for r in results], rotation=20, ha="right")
    axes.set_ylabel("% of the floor's speed" if with_floor else "% of jaxllm's speed")
    axes.axhline(100, color="black", linewidth=0.8, linestyle="--", label="floor" if with_floor else None)
    axes.set_title(f"{_title(facts)}; on the bars: output tok/s", fontsize=10)
    axes.margins(y=0.2)
    axes.legend(fontsize=8, loc="upper left", ncols=len(by_engine) + 1)
    return figure


def serve(facts: Facts, results: Sequence[RateResult]) -> Any:
    """TTFT, TPOT and ITL against the rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    rates = [r.rate for r in results]
    for axes, name in zip(figure.subplots(1, 3), ("ttft", "tpot", "itl"), strict=True):
        for quantile, style in (("p50", "-o"), ("p99", "--o")):
            ours = [getattr(getattr(r.median, name), quantile) * 1e3 for r in results]
            axes.plot(rates, ours, style, label=f"jaxllm {quantile}", color=COLORS["jaxllm"])
            theirs: dict[str, list[tuple[float, float]]] = {}
            for rate in rates:
                for engine, found in peers_of(facts, "poisson_arrivals", rate).items():
                    if f"{name}_{quantile}_ms" in found:
                        theirs.setdefault(engine, []).append((rate, found[f"{name}_{quantile}_ms"]))
            for engine, points in theirs.items():
                label, color = f"{engine} {quantile}", COLORS.get(engine)
                axes.plot(*zip(*points, strict=True), style.replace("o", "s"), label=label, color=color)
        axes.set_xlabel("requests/s")
        axes.set_ylabel(f"{name.upper()}, ms")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.suptitle(_title(facts), fontsize=10)
    return figure


def latency(facts: Facts, results: Sequence[LatencyResult]) -> Any:
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
    figure.suptitle(f"{_title(facts)}; tokens in/out", fontsize=10)
    return figure

"""Results as tables of text, beside their floors and their peers: for a terminal and for a page alike."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.bench import peers
from jaxllm.bench.attention import AttentionResult
from jaxllm.bench.busy import BusyResult
from jaxllm.bench.facts import Facts
from jaxllm.bench.floor import Ceilings
from jaxllm.bench.latency import LatencyResult
from jaxllm.bench.memory import MemoryResult
from jaxllm.bench.parity import TOLERANCE, ParityResult
from jaxllm.bench.serve import TIMES, RateResult
from jaxllm.bench.start import StartResult
from jaxllm.bench.throughput import ThroughputResult


@dataclasses.dataclass
class Table:
    """A title, a heading a column, cells, and notes below. The first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = dataclasses.field(default_factory=list)


def tables_of(part: str, facts: Facts, results: Sequence[Any]) -> list[Table]:
    """The tables of one part's results, of the kinds in `jaxllm.bench.results.KINDS`."""
    make: dict[str, Callable[[Facts, Sequence[Any]], list[Table]]] = {
        "start": start,
        "ceilings": ceilings,
        "attention": attention,
        "memory": memory,
        "parity": parity,
        "throughput": throughput,
        "busy": busy,
        "serve": serve,
        "latency": latency,
    }
    return make[part](facts, results)


def fixed(value: float | None, digits: int = 1, factor: float = 1.0) -> str:
    """A number, or nothing for None."""
    return "" if value is None else f"{value * factor:,.{digits}f}"


def share(value: float | None) -> str:
    """A percentage, or nothing for None."""
    return "" if value is None else f"{value:.1%}"


def figures(value: float) -> str:
    """A number to three figures or more, whatever its size."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def speed(value: float | None) -> str:
    """Tokens a second, to three or four figures."""
    return fixed(value, 1 if value is not None and value < 1000 else 0)


def percent(share: float | None) -> str:
    """To a hundredth of one; empty without a value."""
    return "" if share is None else f"{100 * share:.2f}%"


def count(value: float | None) -> str:
    """A count, or the median of several."""
    return "" if value is None else f"{value:g}"


def peers_of(facts: Facts, workload: str, rate: float | None = None) -> dict[str, dict[str, Any]]:
    """Peers' figures by engine, of runs in 16 bits: figures of quantized models are no match for ours."""
    found = peers.figures(facts.model, workload, facts.device, facts.num_devices, rate)
    return {figure["engine"]: figure for figure in found if "fp8" not in figure["engine"]}


def ratio_to(result: ThroughputResult, figure: dict[str, Any]) -> float:
    """Our speed over a peer's: by seconds where known, else by tokens a second."""
    if "seconds" in figure:
        return figure["seconds"] / result.seconds
    if "output_tok_s" in figure:
        return result.output_tok_s / figure["output_tok_s"]
    return result.total_tok_s / figure["total_tok_s"]


def geometric_mean(values: Sequence[float]) -> float:
    """Of at least one positive number."""
    return math.exp(sum(map(math.log, values)) / len(values))


def throughput(facts: Facts, results: Sequence[ThroughputResult]) -> list[Table]:
    """Each workload beside the floor, and with what every peer reached and the ratio of speeds."""
    theirs = {r.workload: peers_of(facts, r.workload) for r in results}
    engines = sorted({engine for found in theirs.values() for engine in found}, reverse=True)
    columns = ["all requests at once", "seconds", "of runs of", "output tok/s", "total tok/s"]
    for engine in engines:
        columns += [f"{engine}, output tok/s", f"jaxllm ÷ {engine}"]
    columns += ["floor, s", "of the floor's speed", "padding"]
    rows: list[list[str]] = []
    ratios: dict[str, list[float]] = {engine: [] for engine in engines}
    for r in results:
        runs = ", ".join(fixed(each, 3) for each in r.all_seconds)
        row = [r.workload, fixed(r.seconds, 3), runs, speed(r.output_tok_s), speed(r.total_tok_s)]
        for engine in engines:
            figure = theirs[r.workload].get(engine)
            if figure is None:
                row += ["", ""]
            else:
                ratios[engine].append(ratio_to(r, figure))
                row += [speed(figure.get("output_tok_s")), fixed(ratios[engine][-1], 2)]
        rows.append([*row, fixed(r.floor_seconds, 3), share(r.floor_share), share(r.padded_share)])
    notes = [
        f"Geometric mean of jaxllm ÷ {engine} over {len(found)} workloads: {geometric_mean(found):.3f}."
        for engine, found in ratios.items()
    ]
    for name, values in (
        ("compilations while serving", [r.late_compilations for r in results]),
        ("preemptions", [r.preemptions for r in results]),
    ):
        if any(values):
            notes.append(f"{name}: {sum(value or 0 for value in values)}.")
    return [Table("Throughput", columns, rows, notes + sources(facts, engines))]


def sources(facts: Facts, engines: Sequence[str]) -> list[str]:
    """How and on what peers' figures for this device were taken."""
    return [f"{engine}: {peers.source(engine, facts.device, facts.num_devices)}." for engine in engines]


_COMPARED = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "itl_p99")


def serve(facts: Facts, results: Sequence[RateResult]) -> list[Table]:
    """Every rate beside its peers, and every figure of every rate."""
    names = [name.upper().replace("_P", " p") for name in _COMPARED]
    compared = Table(
        "Online: Poisson arrivals, milliseconds",
        ["requests/s", "engine", *names, "output tok/s", "requests/s done", "runs"],
        [],
    )
    engines = set()
    for r in results:
        ours = [getattr(getattr(r.median, name[:-4]), name[-3:]) * 1e3 for name in _COMPARED]
        rate = [speed(r.median.output_tok_s), fixed(r.median.request_s, 2), count(len(r.runs))]
        compared.rows.append([f"{r.rate:g}", "jaxllm", *(fixed(value, 2) for value in ours), *rate])
        for engine, figure in peers_of(facts, "poisson_arrivals", r.rate).items():
            engines.add(engine)
            theirs = [figure.get(f"{name}_ms") for name in _COMPARED]
            pairs = zip(ours, theirs, strict=True)
            cells = [f"{value:.2f} ({mine / value:.2f}×)" if value else "" for mine, value in pairs]
            compared.rows.append(["", engine, *cells, speed(figure["output_tok_s"]), "", ""])
    if engines:
        compared.notes.append("In brackets: jaxllm's time over theirs.")
    compared.notes.append("jaxllm: medians of its runs.")
    compared.notes += sources(facts, sorted(engines))
    columns = ["requests/s", "", "mean", "p50", "p90", "p99"]
    every = Table("Online: every time, milliseconds", columns, [])
    for r in results:
        for name in TIMES:
            spread = getattr(r.median, name)
            cells = [fixed(getattr(spread, column), 2, 1e3) for column in columns[2:]]
            every.rows.append([f"{r.rate:g}" if name == TIMES[0] else "", name.upper(), *cells])
        if r.median.goodput_s is not None:
            every.notes.append(f"At {r.rate:g} requests/s, {r.median.goodput_s:.2f} requests/s kept the limits.")
        for name in ("late_compilations", "preemptions"):
            if getattr(r.median, name):
                every.notes.append(f"At {r.rate:g} requests/s: {name.replace('_', ' ')} {getattr(r.median, name):g}.")
    return [compared, every]


def latency(facts: Facts, results: Sequence[LatencyResult]) -> list[Table]:
    """Batch-1 figures in milliseconds."""
    columns = "in/out", "TTFT p50", "p99", "floor", "TPOT p50", "p99", "floor", "tok/s", "GB/s", "of the floor", "late"
    rows = [
        [
            f"{r.input_tokens}/{r.output_tokens}",
            fixed(r.ttft_p50, 2, 1e3),
            fixed(r.ttft_p99, 2, 1e3),
            fixed(r.ttft_floor, 2, 1e3),
            fixed(r.tpot_p50, 3, 1e3),
            fixed(r.tpot_p99, 3, 1e3),
            fixed(r.tpot_floor, 3, 1e3),
            speed(r.decode_tok_s),
            fixed(r.bandwidth, 1, 1e-9),
            share(r.floor_share),
            count(r.late_compilations),
        ]
        for r in results
    ]
    return [Table("One request at a time, milliseconds", list(columns), rows)]


def start(facts: Facts, results: Sequence[StartResult]) -> list[Table]:
    """Seconds of new processes."""
    columns = ["compilation cache", "imports", "LLM(...)", "first token", "8 tokens", "all compiled", "engine start"]
    rows = [
        [r.cache, *(fixed(v) for v in (r.imported, r.ready, r.first_token, r.answered, r.compiled, r.engine_start))]
        for r in results
    ]
    theirs = peers_of(facts, "engine_start")
    rows += [[f"{engine}, empty", "", "", "", "", "", fixed(f["seconds"])] for engine, f in theirs.items()]
    note = "From the start of the process; the last column from LLM(...) to the first token, imports not counted."
    counts = sorted({r.num_executables for r in results})
    notes = [note, f"Executables: {', '.join(map(str, counts))}.", *sources(facts, sorted(theirs))]
    return [Table("Start of a new process, seconds", columns, rows, notes)]


def ceilings(facts: Facts, results: Sequence[Ceilings]) -> list[Table]:
    """What the device gives to a copy and to a product."""
    rows = [[facts.device, figures(r.bandwidth * 1e-9), figures(r.flops * 1e-12)] for r in results]
    return [Table("Ceilings of this device", ["device", "memory, GB/s", "GEMM, TFLOP/s"], rows)]


def attention(facts: Facts, results: Sequence[AttentionResult]) -> list[Table]:
    """A layer's attention, decodes by bandwidth and prefills by FLOPs."""
    columns = [
        "one layer of attention with its write",
        "batch",
        "µs",
        "of them in kernels",
        "in that of the write",
        "GB/s of keys and values",
        "TFLOP/s",
        "of ceiling",
        "by the clock",
    ]
    rows = [
        [
            r.kind,
            r.batch,
            fixed(r.seconds, 1, 1e6),
            fixed(r.kernel_seconds, 1, 1e6),
            fixed(r.write_seconds or None, 1, 1e6),
            figures(r.bandwidth * 1e-9) if r.kind == "decode" else "",
            figures(r.flops * 1e-12) if r.kind == "prefill" else "",
            share(r.share),
            figures(_by_the_clock(r)),
        ]
        for r in results
    ]
    kinds = {f"backend {r.backend!r}, pages of {r.page_size}" for r in results}
    note = (
        f"{'; '.join(sorted(kinds))}. Rates are those of the attention kernels where there are some, which for decodes "
        "write, too; by the clock, GB/s for decodes and TFLOP/s for prefills, they are of all that a layer's call "
        "takes: the write, what joins queries, keys and values, and pauses."
    )
    return [Table("Attention", columns, rows, [note])]


def _by_the_clock(r: AttentionResult) -> float:
    """GB/s or TFLOP/s."""
    rate = r.bandwidth * 1e-9 if r.kind == "decode" else r.flops * 1e-12
    return rate * (r.kernel_seconds or r.seconds) / r.seconds


def memory(facts: Facts, results: Sequence[MemoryResult]) -> list[Table]:
    """Plan and truth in GB."""
    columns = ["GB, after", "budget", "weights", "cache", "largest step", "live arrays", "in use", "peak", "host peak"]
    rows = []
    for r in results:
        amounts = r.budget, r.weights, r.cache, r.step, r.live, r.in_use, r.peak, r.host_peak
        rows.append([r.after, *(fixed(amount, 3, 1e-9) for amount in amounts)])
    notes = [
        "Budget, weights and cache are planned; the largest step's temporaries are XLA's figure; in use and peak are "
        "the device allocator's, live arrays JAX's."
    ]
    return [Table("Memory", columns, rows, notes)]


def parity(facts: Facts, results: Sequence[ParityResult]) -> list[Table]:
    """How far the kernel's logits and choices are from the reference's."""
    columns = ["backend", "beside", "greedy tokens", "not its best", "worst gap", "answers parted", "worst gap there"]
    columns += ["compared", "worst error", "mean error", "error of all", "worst single logit"]
    columns += ["within 2%", "tolerance", "outside", "", "reference beside float32: worst", "mean", "of all"]
    columns += ["backend beside float32: mean"]
    rows = []
    for r in results:
        counts = count(r.num_tokens), count(r.num_other)
        parted = f"{r.num_parted} of {r.num_answers}", percent(r.worst_parting)
        rows.append([r.backend, r.reference, *counts, percent(r.worst_gap), *parted, r.compared])
        rows[-1] += map(percent, (r.worst_error, r.mean_error, r.whole_error, r.worst_largest))
        strict = ("each error", r.worst_error), ("the error of all", r.whole_error), ("partings", r.worst_parting)
        within = [name for name, worst in strict if worst is not None and worst <= TOLERANCE]
        rows[-1] += [", ".join(within) or "nothing", percent(r.tolerance), count(r.num_outside)]
        rows[-1].append("agree" if r.agrees else "DIFFER")
        rows[-1] += map(percent, (r.rounding_worst, r.rounding_mean, r.whole_rounding, r.backend_mean))
    note = (
        "An error is that of one position: the norm of the differences over the norm of the reference's, of all logits "
        "or of the logprobs of the most likely tokens; the error of all is of all positions at once; that of a single "
        "logit is the largest difference over the reference's largest logit. A gap is how far below the reference's "
        "best token a chosen one lies, relative to that one's logit or logprob; an answer parts at its first token "
        "that is not the reference's best. Tolerance, of the error of all and of the worst gap where answers part: 2%, "
        "or twice what rounding to the run's dtype does to the reference where that is more; a position is outside if "
        "its own error is more than 2% and twice the rounding there or on average. Where logprobs were compared, "
        "tolerance is of the worst error, and that of twice the worst rounding."
    )
    return [Table("Greedy tokens beside the reference path", columns, rows, [note])]


def busy(facts: Facts, results: Sequence[BusyResult]) -> list[Table]:
    """The device's busy share, and where its time goes."""
    columns = [
        "workload",
        "seconds",
        "profiled seconds",
        "device busy, s",
        "of profiled seconds",
        "of seconds",
        "padding",
        "steps",
        "host's work a step, ms",
        "of it in launches",
    ]
    rows = [
        [
            r.workload,
            fixed(r.seconds, 3),
            fixed(r.traced_seconds, 3),
            fixed(r.busy_seconds, 3),
            share(r.busy_share),
            share(r.busy_share_untraced),
            share(r.padded_share),
            count(r.steps),
            fixed(r.host_seconds, 3, 1e3),
            fixed(r.launch_seconds, 3, 1e3),
        ]
        for r in results
    ]
    notes = [
        "Busy is the time in which at least one kernel or copy ran in the run under the profiler: its share of that "
        "run's seconds, and of those of the run before it without the profiler, which slows the host more than "
        "kernels. The host's work is that of the run without it, waiting for the device left out; launches are JAX's "
        "calls, which end when XLA has passed all kernels on."
    ]
    tables = [Table("Busy device", columns, rows, notes)]
    for r in results:
        cells = []
        for k in r.kernels:
            told = fixed(k.seconds / r.steps, 3, 1e3), fixed(k.calls / r.steps), share(k.seconds / r.kernel_seconds)
            cells.append([k.name[:60], *told])
        columns = [f"kernels of {r.workload}", "ms a step", "calls a step", "of all kernels' time"]
        tables.append(Table(f"Where the time of {r.workload} goes", columns, cells))
    return tables

"""`jaxllm bench`: throughput, latency and serve; all of them and more in one run; the report; and calibrations."""

import asyncio
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxllm.cli.calibrate import calibrate
from jaxllm.cli.options import Command, engine_options

app = typer.Typer(no_args_is_help=True, help="Measure the engine and set it beside the hardware's floor and its peers.")
app.command()(calibrate)


@dataclasses.dataclass(kw_only=True)
class Measured:
    """Flags of every command that runs an engine."""

    model: Annotated[
        str, typer.Option(help="as in generate, or shape:NAME (shape:llama-3.1-8b) for random weights")
    ] = "smollm2"
    compile_first: Annotated[
        bool, typer.Option("--compile-first/--compile-late", help="compile all step sizes before measuring")
    ] = True
    commit: Annotated[str | None, typer.Option(help="which commit this is, where git cannot tell")] = None


@dataclasses.dataclass(kw_only=True)
class Written(Measured):
    """Flags of commands with one kind of results."""

    json: Annotated[Path | None, typer.Option("--json", help="write the results to this file")] = None
    plot: Annotated[Path | None, typer.Option("--plot", help="draw the results to this file (needs matplotlib)")] = None


@dataclasses.dataclass(kw_only=True)
class Offline(Written):
    """Flags of commands that compare with the floor."""

    ceilings: Annotated[
        bool, typer.Option(help="measure the device's bandwidth and GEMM rate first, for the floor")
    ] = True


@dataclasses.dataclass(kw_only=True)
class Arrivals:
    """Flags of what arrives online."""

    rate: Annotated[list[float] | None, typer.Option(help="requests/s; may be given again")] = None
    num_requests: Annotated[int, typer.Option(min=1, help="requests of each online run")] = 256
    mean_in: Annotated[int, typer.Option(min=2, help="mean prompt tokens of online requests")] = 512
    mean_out: Annotated[int, typer.Option(min=2, help="mean output tokens of online requests")] = 128
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MS", help="count requests within ttft, tpot or e2el milliseconds; may be given again"
        ),
    ] = None


Page = Annotated[Path | None, typer.Option(help="write the measured part of this page, between its marks")]
Plots = Annotated[Path | None, typer.Option(help="draw SVG files into this directory; the page shows them")]
BENCH_ENGINE = ("model", "warm_up")  # --compile-first says what --warm-up would


def flags(**groups: type) -> Callable[[Command], Command]:
    """Gives a command the flags of dataclasses: `flags(options=Offline)` passes an `Offline` as `options`."""
    parameters = {into: inspect.signature(kind).parameters for into, kind in groups.items()}

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> Any:
            made = {
                into: kind(**{name: values.pop(name) for name in parameters[into]}) for into, kind in groups.items()
            }
            return command(**values, **made)

        own = inspect.signature(command, eval_str=True)
        shown = [parameter for name, parameter in own.parameters.items() if name not in groups]
        shown += [parameter for found in parameters.values() for parameter in found.values()]
        del run.__wrapped__  # what typer must see is the new list
        run.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        return run

    return decorate


def _open(
    options: Offline, engine: dict[str, Any], prompt_length: int, check: Callable[[Any, int], None] | None = None
) -> Any:
    from jaxllm.bench.session import open_session
    from jaxllm.cli.start import shows_progress

    return open_session(
        options.model,
        {"warm_up": options.compile_first, **engine},
        prompt_length=prompt_length,
        ceilings=options.ceilings,
        warm_up=options.compile_first,
        progress=shows_progress(),
        commit=options.commit,
        check=check,
    )


def _check_plot(options: Written) -> None:
    if options.plot is not None:
        from jaxllm.bench.plots import check_plot

        check_plot()


def _show(console: Any, options: Written, part: str, facts: Any, results: Sequence[Any]) -> None:
    """Prints results, and writes and draws them where that was asked for."""
    from jaxllm.bench import plots, report
    from jaxllm.bench.results import Part, save

    made = Part(part, facts, list(results))
    report.print_part(console, made)
    if options.json is not None:
        save(options.json, part, facts, results)
    if options.plot is not None:
        plots.plot_part(options.plot, made)


def _work(arrivals: Arrivals, rates: Sequence[float], runs: int) -> Any:
    """What arrives. Raises InvalidRequestError."""
    from jaxllm.bench.serve import ServeWork
    from jaxllm.errors import InvalidRequestError

    limits = {}
    for text in arrivals.goodput or []:
        name, _, value = text.partition(":")
        try:
            limits[name] = float(value) / 1e3
        except ValueError:
            raise InvalidRequestError("goodput", text, "must be a name and milliseconds, such as ttft:200") from None
    return ServeWork(
        rates=tuple(arrivals.rate or rates),
        num_requests=arrivals.num_requests,
        mean_in=arrivals.mean_in,
        mean_out=arrivals.mean_out,
        runs=runs,
        goodput=limits,
    )


@app.command()
@engine_options(without=BENCH_ENGINE)
@flags(options=Offline)
def throughput(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(help="names of jaxllm.bench.workloads (default: all of this kind of device that fit the model)"),
    ] = None,
    *,
    runs: Annotated[int, typer.Option(min=1, help="runs of each; the fastest counts")] = 2,
    num_requests: Annotated[int | None, typer.Option(min=1, help="cut or grow each workload to so many")] = None,
    options: Offline,
    engine: dict,
) -> None:
    """All of a workload's requests at once: tokens a second, against the floor and other engines."""
    from jaxllm.bench import report
    from jaxllm.bench.throughput import choose_workloads, run_throughput, workload
    from jaxllm.errors import InvalidRequestError

    _check_plot(options)
    given = [] if not workloads or workloads == ["all"] else workloads
    for name in given:
        workload(name, 1000, num_requests)  # an unknown name is refused before any work
    console = report.console()
    names: list[str] = []

    def choose(llm: Any, vocab_size: int) -> None:
        import jax

        on_cpu = jax.default_backend() == "cpu"
        chosen, left_out = choose_workloads(
            given, vocab_size, llm.max_model_len, on_cpu=on_cpu, num_requests=num_requests
        )
        for reason in left_out.values():
            console.print(f"left out: {reason}", style="dim", highlight=False, markup=False)
        if not chosen:
            raise InvalidRequestError("workloads", None, f"none fits max_model_len={llm.max_model_len}: name one")
        names.extend(chosen)

    results: list[Any] = []
    with _open(options, engine, 128, choose) as session:
        report.print_session(console, session)
        try:
            for name in names:
                results.append(run_throughput(session, name, runs, num_requests))
                console.print(f"{name}: {results[-1].seconds:.3f} s", style="dim", highlight=False)
        finally:  # a workload that fails does not take the others' results with it
            if results:
                _show(console, options, "throughput", session.facts, results)


@app.command()
@engine_options(without=BENCH_ENGINE)
@flags(options=Offline)
def latency(
    *,
    input_len: Annotated[list[int] | None, typer.Option(min=1, help="prompt tokens; may be given again")] = None,
    output_len: Annotated[int, typer.Option(min=2, help="tokens to generate")] = 128,
    runs: Annotated[int, typer.Option(min=1, help="requests measured, after one that is not")] = 5,
    options: Offline,
    engine: dict,
) -> None:
    """One request at a time: time to first token (TTFT) and per output token (TPOT)."""
    from jaxllm.bench import report
    from jaxllm.bench.latency import run_latency

    _check_plot(options)
    lengths = input_len or [128]
    console = report.console()
    with _open(options, engine, lengths[0]) as session:
        report.print_session(console, session)
        results = [run_latency(session, length, output_len, runs) for length in lengths]
        _show(console, options, "latency", session.facts, results)


@app.command()
@engine_options(without=BENCH_ENGINE)
@flags(options=Written, arrivals=Arrivals)
def serve(
    *,
    runs: Annotated[int, typer.Option(min=1, help="runs at each rate; medians are shown")] = 1,
    url: Annotated[str | None, typer.Option(help="send them to this server of --model instead (no /v1)")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="JAXLLM_API_KEY", help="with --url")] = None,
    options: Written,
    arrivals: Arrivals,
    engine: dict,
) -> None:
    """Requests arriving at random (default: 4 a second) through AsyncLLM: TTFT, TPOT, ITL and end-to-end latency."""
    from jaxllm.bench import report
    from jaxllm.bench.facts import gather
    from jaxllm.bench.models import model_name
    from jaxllm.bench.serve import run_serve
    from jaxllm.config import config_from
    from jaxllm.errors import InvalidRequestError

    _check_plot(options)
    work = _work(arrivals, [4.0], runs)
    console = report.console()
    if url is not None:
        if engine:
            raise InvalidRequestError("url", url, f"the server has its own settings: leave out {', '.join(engine)}")
        from jaxllm.bench.served import run_served

        results = asyncio.run(run_served(url, options.model, work, api_key))
        facts = gather(model_name(options.model), {}, device="server", num_devices=1, dtype="", commit=options.commit)
        _show(console, options, "serve", facts, results)
        return
    settings = {"warm_up": options.compile_first, **engine}
    results = asyncio.run(run_serve(options.model, settings, work, warm_up=options.compile_first))

    import jax  # only now: while the engine lives in its own process, this one must not take the device's memory

    from jaxllm.engine.resolve import resolve_dtype

    config = config_from(options.model, settings)
    facts = gather(
        model_name(options.model),
        settings,
        device=jax.devices()[0].device_kind,
        num_devices=config.num_devices,
        dtype=resolve_dtype(config).name,
        commit=options.commit,
    )
    report.print_facts(console, facts)
    _show(console, options, "serve", facts, results)


@app.command("all")
@engine_options(without=(*BENCH_ENGINE, "engine_process"))
@flags(options=Measured, arrivals=Arrivals)
def every(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="directory of the results, a file a part")],
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART,...",
            help="start, parity, ceilings, attention, memory, throughput, busy, serve (default: all of them)",
        ),
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help="for throughput; may be given again (default: all that fit)")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="runs of each workload; the fastest counts")] = 2,
    busy: Annotated[
        list[str] | None,
        typer.Option(metavar="WORKLOAD", help="for busy; may be given again (default: decode_heavy, or cpu_ragged)"),
    ] = None,
    serve_runs: Annotated[int, typer.Option(min=1, help="runs at each rate; medians are shown")] = 3,
    page: Page = None,
    plots: Plots = None,
    options: Measured,
    arrivals: Arrivals,
    engine: dict,
) -> None:
    """Every part of a report over one engine, warmed up once: each result is written as soon as it is there. With
    --page the report of all results in --output follows.

    Online requests arrive at 4, 12, 20 and 28 a second, 256 each time: for a CPU choose less (--rate, --num-requests).
    """
    from jaxllm.bench import report
    from jaxllm.bench.suite import PARTS, Suite, run_suite
    from jaxllm.cli.start import shows_progress

    _check_page(page, plots)
    parts = [part for text in only or [] for part in text.split(",")]
    suite = Suite(
        model=options.model,
        options=engine,
        output=output,
        parts=parts or PARTS,
        workloads=workload or (),
        runs=runs,
        busy=busy or (),
        serve=_work(arrivals, [4.0, 12.0, 20.0, 28.0], serve_runs),
        warm_up=options.compile_first,
        commit=options.commit,
        progress=shows_progress(),
    )
    console = report.console()
    failed = run_suite(
        suite,
        lambda line: console.print(line, style="dim", highlight=False, markup=False),
        lambda part: report.print_part(console, part),
    )
    if page is not None:
        _write_page(page, plots, [output])
    if failed:
        raise typer.Exit(1)


@app.command("report")
def write_report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="directories of results, and files (default: docs/results)")
    ] = None,
    *,
    page: Page = None,
    plots: Plots = None,
) -> None:
    """Tables and plots of kept results; of several runs of one part the latest counts."""
    from jaxllm.bench import report
    from jaxllm.bench.results import load_all

    _check_page(page, plots)
    places = results or [Path("docs/results")]
    if page is not None:
        _write_page(page, plots, places)
        return
    console = report.console()
    for part in load_all(places):
        report.print_facts(console, part.facts)
        report.print_part(console, part)


def _check_page(page: Path | None, plots: Path | None) -> None:
    """Raises ConfigError before any work."""
    from jaxllm.bench.page import replace
    from jaxllm.bench.plots import check_plot
    from jaxllm.errors import ConfigError

    if plots is not None:
        check_plot()
        if page is None:
            raise ConfigError("--plots needs --page")
    if page is not None:
        try:
            replace(page.read_text(), "")
        except OSError as error:
            raise ConfigError(f"--page: {error}") from error


def _write_page(page: Path, plots: Path | None, places: Sequence[Path]) -> None:
    from jaxllm.bench.page import write
    from jaxllm.bench.results import load_all

    for path in [page, *write(page, plots, load_all(places))]:
        print(path)

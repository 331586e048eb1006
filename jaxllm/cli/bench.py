"""`jaxllm bench`: throughput, latency and serve."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxllm.cli.options import engine_options

app = typer.Typer(no_args_is_help=True, help="Measure the engine and set it beside the hardware's floor and its peers.")

Model = Annotated[str, typer.Option(help="as in generate, or shape:NAME (shape:llama-3.1-8b) for random weights")]
Json = Annotated[Path | None, typer.Option("--json", help="write the results to this file")]
Plot = Annotated[Path | None, typer.Option("--plot", help="draw the results to this file (needs matplotlib)")]
Ceilings = Annotated[bool, typer.Option(help="measure the device's bandwidth and GEMM rate first, for the floor")]
WarmUp = Annotated[bool, typer.Option("--compile-first/--compile-late", help="compile all step sizes before measuring")]
BENCH_ENGINE = ("model", "warm_up")  # --compile-first says what --warm-up would


def _open(
    model: str,
    engine: dict[str, Any],
    ceilings: bool,
    compile_first: bool,
    prompt_length: int,
    check: Callable[[Any, int], None] | None = None,
) -> Any:
    from jaxllm.bench.session import open_session
    from jaxllm.cli.start import shows_progress

    options = {"warm_up": compile_first, **engine}
    return open_session(
        model,
        options,
        prompt_length=prompt_length,
        ceilings=ceilings,
        warm_up=compile_first,
        progress=shows_progress(),
        check=check,
    )


def _check_plot(plot: Path | None) -> None:
    if plot is not None:
        from jaxllm.bench.report import check_plot

        check_plot()


@app.command()
@engine_options(without=BENCH_ENGINE)
def throughput(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(help="names of jaxllm.bench.workloads (default: all of this kind of device that fit the model)"),
    ] = None,
    *,
    model: Model = "smollm2",
    runs: Annotated[int, typer.Option(min=1, help="runs of each; the fastest counts")] = 2,
    num_requests: Annotated[int | None, typer.Option(min=1, help="cut or grow each workload to so many")] = None,
    json: Json = None,
    plot: Plot = None,
    ceilings: Ceilings = True,
    compile_first: WarmUp = True,
    engine: dict,
) -> None:
    """All of a workload's requests at once: tokens a second, against the floor and other engines."""
    from jaxllm.bench import report
    from jaxllm.bench.throughput import choose_workloads, run_throughput, workload
    from jaxllm.errors import InvalidRequestError

    _check_plot(plot)
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

    results = []
    with _open(model, engine, ceilings, compile_first, 128, choose) as session:
        report.print_session(console, model, session)
        try:
            for name in names:
                results.append(run_throughput(session, name, runs, num_requests))
                console.print(f"{name}: {results[-1].seconds:.3f} s", style="dim", highlight=False)
        finally:  # a workload that fails does not take the others' results with it
            if results:
                report.print_throughput(console, model, session, results)
                if json is not None:
                    report.write_json(json, "throughput", model, session.facts(), results)
                if plot is not None:
                    report.plot_throughput(plot, model, session, results)


@app.command()
@engine_options(without=BENCH_ENGINE)
def latency(
    *,
    model: Model = "smollm2",
    input_len: Annotated[list[int] | None, typer.Option(min=1, help="prompt tokens; may be given again")] = None,
    output_len: Annotated[int, typer.Option(min=2, help="tokens to generate")] = 128,
    runs: Annotated[int, typer.Option(min=1, help="requests measured, after one that is not")] = 5,
    json: Json = None,
    plot: Plot = None,
    ceilings: Ceilings = True,
    compile_first: WarmUp = True,
    engine: dict,
) -> None:
    """One request at a time: time to first token (TTFT) and per output token (TPOT)."""
    from jaxllm.bench import report
    from jaxllm.bench.latency import run_latency

    _check_plot(plot)
    lengths = input_len or [128]
    console = report.console()
    with _open(model, engine, ceilings, compile_first, lengths[0]) as session:
        report.print_session(console, model, session)
        results = [run_latency(session, length, output_len, runs) for length in lengths]
        report.print_latency(console, model, session, results)
        if json is not None:
            report.write_json(json, "latency", model, session.facts(), results)
        if plot is not None:
            report.plot_latency(plot, model, session, results)


@app.command()
@engine_options(without=BENCH_ENGINE)
def serve(
    *,
    model: Model = "smollm2",
    rate: Annotated[list[float] | None, typer.Option(help="requests/s; may be given again (default: 4)")] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="requests of each run")] = 256,
    mean_in: Annotated[int, typer.Option(min=2, help="mean prompt tokens")] = 512,
    mean_out: Annotated[int, typer.Option(min=2, help="mean output tokens")] = 128,
    runs: Annotated[int, typer.Option(min=1, help="runs at each rate; medians are shown")] = 1,
    json: Json = None,
    plot: Plot = None,
    compile_first: WarmUp = True,
    engine: dict,
) -> None:
    """Requests arriving at random through AsyncLLM: TTFT, TPOT and inter-token latency (ITL)."""
    from jaxllm.bench import report
    from jaxllm.bench.serve import run_serve

    _check_plot(plot)
    work = run_serve(
        model,
        {"warm_up": compile_first, **engine},
        rate or [4.0],
        num_requests=num_requests,
        mean_in=mean_in,
        mean_out=mean_out,
        runs=runs,
        warm_up=compile_first,
    )
    results = asyncio.run(work)

    import jax  # only now: while the engine lives in its own process, this one must not take the device's memory

    facts = {"device": jax.devices()[0].device_kind, "num_devices": engine.get("data_parallel_size", 1)}
    facts["num_devices"] *= engine.get("tensor_parallel_size", 1)
    medians = [median for median, _ in results]
    report.print_serve(report.console(), model, facts["device"], facts["num_devices"], medians)
    if json is not None:
        report.write_json(json, "serve", model, facts, medians)
    if plot is not None:
        report.plot_serve(plot, model, facts["device"], medians)

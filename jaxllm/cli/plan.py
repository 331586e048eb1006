"""`jaxllm plan`: whether a model fits, how much cache is left, and how fast it can be."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jaxllm.cli.flags import flags_of
from jaxllm.config import EngineConfig

_HELP = {field.name: field.metadata["help"] for field in dataclasses.fields(EngineConfig)}
_ENGINE = "Engine"


def _engine(name: str, help: str | None = None, min: int | None = None) -> Any:
    """The flag of an engine's option, under all its names and with its help unless it means something else here."""
    return typer.Option(*flags_of(name), help=help or _HELP[name], min=min, rich_help_panel=_ENGINE)


def plan(
    model: Annotated[str, typer.Argument(help="as in generate, or shape:NAME (shape:llama-3.1-8b) for a known shape")],
    *,
    chip: Annotated[str, typer.Option(help="v4, v5e, v5p, v6e, tpu7x, h100, h200, a100-80gb, a100-40gb or l4")],
    chips: Annotated[int, typer.Option(min=1, help="how many of them")] = 1,
    context: Annotated[int, typer.Option("--context", "--input-len", min=1, help="prompt tokens of a request")] = 1024,
    output_len: Annotated[int, typer.Option(min=1, help="output tokens of a request")] = 128,
    workload: Annotated[
        list[str] | None, typer.Option(help="predict this workload of jaxllm bench too; may be given again")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="write the plan to this file; -: print it instead of tables")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="draw the plan to this file (needs matplotlib)")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="what was measured on the chip, as in jaxllm/plan/calibrations")
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, _engine("tensor_parallel_size", "fix the mesh's tensor shards", min=1)
    ] = None,
    data_parallel_size: Annotated[int | None, _engine("data_parallel_size", "fix the mesh's ranks", min=1)] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], _engine("dtype")] = "auto",
    max_model_len: Annotated[int | None, _engine("max_model_len")] = None,
    max_num_seqs: Annotated[int | None, _engine("max_num_seqs")] = None,
    max_num_batched_tokens: Annotated[int | None, _engine("max_num_batched_tokens")] = None,
    page_size: Annotated[int, _engine("page_size")] = 64,
    memory_utilization: Annotated[float, _engine("memory_utilization")] = 0.9,
    kv_cache_memory_bytes: Annotated[int | None, _engine("kv_cache_memory_bytes")] = None,
    revision: Annotated[str | None, _engine("revision")] = None,
) -> None:
    """Whether a model fits a chip that need not be here, what cache is left, TTFT and TPOT, and the best mesh."""
    from rich.console import Console

    from jaxllm.bench.models import PREFIX, SHAPE_MAX_MODEL_LEN, bench_model, model_name
    from jaxllm.bench.throughput import workload as workload_of
    from jaxllm.checkpoint import open_checkpoint
    from jaxllm.errors import ConfigError, OutOfMemoryError
    from jaxllm.plan.chips import calibration_of, read_calibration
    from jaxllm.plan.chips import chip as chip_of
    from jaxllm.plan.fit import DTYPES, clock, fit, read_model
    from jaxllm.plan.plan import chips_needed, make_plan
    from jaxllm.plan.show import print_plan, refusal_to_json, to_json

    _check_outputs(json, plot)
    device = chip_of(chip)
    for name in workload or []:
        workload_of(name, 1000)  # an unknown name is refused before any work
    known = read_calibration(calibration) if calibration else calibration_of(device)
    if known is not None and known.chip != device.name:
        raise ConfigError(f"calibration={str(calibration)!r}: was taken on {known.chip}, not on {device.name}")
    given: dict[str, Any] = {} if max_model_len is None else {"max_model_len": max_model_len}
    if max_model_len is None and model.startswith(PREFIX):
        given = {"max_model_len": max(SHAPE_MAX_MODEL_LEN, context + output_len)}  # the measured shapes' own is shorter
    with bench_model(model, given) as (path, options):
        config = EngineConfig(
            model=path,
            revision=revision,
            dtype=dtype,
            max_model_len=options.get("max_model_len"),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            page_size=page_size,
            memory_utilization=memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
        )
        found = read_model(model_name(model), open_checkpoint(path, revision, weights=False).config, DTYPES[dtype])

    def write(text: str) -> None:
        if json is not None and str(json) == "-":
            print(text)
        elif json is not None:
            json.write_text(text + "\n")

    try:
        made = make_plan(
            found,
            device,
            config,
            known,
            chips=chips,
            data=data_parallel_size,
            tensor=tensor_parallel_size,
            context=context,
            output_len=output_len,
        )
    except OutOfMemoryError as error:
        write(refusal_to_json(str(error), chips_needed(found, device, config, context + output_len)))
        raise
    best = made.throughput
    predicted = []
    if workload:
        from jaxllm.plan.workloads import predict_workload  # it takes the engine's modules along

        fitted = fit(found, device, config, data=best.data, tensor=best.tensor)
        times = clock(found, device, known, best.tensor)
        for name in workload:
            predicted.append(predict_workload(name, workload_of(name, found.config.vocab_size), fitted, times))
    write(to_json(made, predicted))
    if plot is not None:
        from jaxllm.plan.draw import draw

        draw(plot, made)
    if json is None or str(json) != "-":
        console = Console()
        print_plan(console if console.is_terminal else Console(width=max(console.width, 160)), made, predicted)


def _check_outputs(json: Path | None, plot: Path | None) -> None:
    """Raises ConfigError, before any work, for a file that cannot be written."""
    from jaxllm.errors import ConfigError

    for option, path in (("--json", json), ("--plot", plot)):
        if path is not None and str(path) != "-" and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"{option} {path}: must be a file in a directory that exists")
    if plot is not None:
        from jaxllm.bench.plots import check_plot

        check_plot()
        from matplotlib.backend_bases import FigureCanvasBase

        kinds = sorted(FigureCanvasBase.get_supported_filetypes())
        if plot.suffix.removeprefix(".").lower() not in kinds:
            raise ConfigError(f"--plot {plot}: must end in one of .{', .'.join(kinds)}")

"""`jaxllm bench calibrate`: what this chip's parts of a step cost, for the predictions of `jaxllm plan`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

SIZES = {
    "max_num_batched_tokens": 8192,
    "token_rungs": (256, 512, 1024, 2048, 4096, 8192),
    "decode_rungs": (2, 16, 64, 128, 256),
}
MODELS = "shape:llama-3.1-8b", "shape:qwen3-0.6b"  # products decide in the one, the number of layers in the other


def calibrate(
    output: Annotated[Path, typer.Option(help="write the calibration to this file, for jaxllm plan --calibration")],
    *,
    model: Annotated[
        list[str] | None, typer.Option(help="run this model; may be given again (default: a large and a small shape)")
    ] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="run the models once more over so many devices")
    ] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="runs of each batch, of which the fastest counts")] = 2,
    commit: Annotated[str | None, typer.Option(help="which commit this is, where git cannot tell")] = None,
) -> None:
    """Run short batches of known shapes on this device and fit what the parts of a step cost."""
    from rich.console import Console

    from jaxllm.errors import ConfigError

    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: must be a file in a directory that exists")
    make(output, model or MODELS, SIZES, sorted({1, tensor_parallel_size}), rounds, commit, Console())


def make(
    output: Path,
    models: Sequence[str],
    options: dict[str, Any],
    tensor_sizes: Sequence[int],
    rounds: int,
    commit: str | None,
    console: Any,
    chip_kind: str | None = None,
) -> None:
    """Writes the file and prints how well it predicts its own runs. chip_kind: pretends to be such a device.

    Raises ConfigError, before anything is measured, for a device that is no chip of the plan's, or too few of them.
    """
    import gc

    import jax

    from jaxllm.bench.session import open_session
    from jaxllm.bench.short_runs import short_run
    from jaxllm.engine import platform
    from jaxllm.errors import ConfigError
    from jaxllm.plan import calibrate
    from jaxllm.plan.fit import clock, read_model
    from jaxllm.plan.simulate import steps

    platform.configure(max(tensor_sizes))  # JAX takes its share of the memory once, for all sessions
    chip = calibrate.chip_of(chip_kind or jax.devices()[0].device_kind)
    if max(tensor_sizes) > len(jax.devices()):
        raise ConfigError(f"tensor_parallel_size={max(tensor_sizes)}: there are {len(jax.devices())} devices")
    ceilings: Any = True
    attention: list[Any] = []
    runs, facts = [], None
    for tensor in tensor_sizes:
        for name in models:
            given = {**options, "tensor_parallel_size": tensor}
            with open_session(name, given, ceilings=ceilings, commit=commit) as session:
                facts, plan, hf = facts or session.facts, session.core.runner.plan, session.hf
                if plan.dtype.itemsize != 2:
                    raise ConfigError(f"model={name!r} runs in {plan.dtype.name} here: a calibration is of bfloat16")
                ceilings = session.ceilings if ceilings is True else ceilings
                times = clock(read_model(name, hf, plan.dtype.name), chip, None, tensor)
                for title, requests in calibrate.runs_of(session.vocab_size, plan.scheduler.max_model_len):
                    made = list(steps(requests, plan.scheduler, plan.groups, plan.decode_rungs))
                    found = short_run(session, requests, rounds)
                    tokens = sum(len(prompt) for prompt, _ in requests)
                    title = f"{session.facts.model}, {title}" + (f", {tensor} shards" if tensor > 1 else "")
                    took = found.seconds, found.host_seconds
                    runs.append(calibrate.Run(title, times, made, *took, tokens, found.admission_seconds))
                    console.print(f"{title}: {found}", highlight=False, soft_wrap=True)
            backend = plan.backend, plan.dtype, plan.page_size
            del session, plan
            gc.collect()  # two models' caches do not fit
            if not attention:
                attention = _attention(times, hf, *backend)
    assert facts is not None and facts.ceilings is not None
    sources = [
        f"One {facts.device}, driver {facts.driver}, {facts.host}; jaxllm at {facts.commit}, jax {facts.jax}, "
        f"{facts.date[:10]}: {facts.command}",
        f"bandwidth: a copy, {facts.ceilings.bandwidth / 1e12:.3g} TB/s; its products reached "
        f"{facts.ceilings.flops / 1e12:.0f} TFLOP/s",
    ]
    fitted = calibrate.solve(chip, runs, attention, facts.ceilings.bandwidth, sources)
    off = calibrate.errors(fitted, runs)
    worst = max(off, key=lambda title: abs(off[title]))
    mean = sum(map(abs, off.values())) / len(off)
    fitted = calibrate.with_source(
        fitted,
        f"all others: fitted to {len(attention)} times of attention and {len(runs)} runs of {', '.join(models)}; the "
        f"{len(off)} in which the device decides are predicted within {abs(off[worst]):.0%} (the worst: {worst}), "
        f"{mean:.1%} on average",
    )
    calibrate.write(fitted, output)
    for run in runs:
        told = f"predicted {off[run.name]:+.1%}" if run.name in off else "the host decides"
        console.print(f"{run.name}: {run.device_seconds:.3f} s, {told}", highlight=False)
    console.print(f"{output}: {fitted.sources[-1]}", highlight=False, soft_wrap=True)


def _attention(clock: Any, hf: Any, backend: str, dtype: Any, page_size: int) -> list[Any]:
    """What attention takes with a model's heads, by its kernels where the profiler tells them."""
    from jaxllm.bench.attention import measure_attention
    from jaxllm.plan import calibrate

    given = {("prefill" if rows[0][0] > 1 else "decode", name): rows for name, rows in calibrate.ATTENTION.items()}
    found = measure_attention(hf, backend=backend, dtype=dtype, page_size=page_size, given=given)
    return [
        calibrate.AttentionTime(clock, rows, result.kernel_seconds or result.seconds)
        for rows, result in zip(given.values(), found, strict=True)
    ]

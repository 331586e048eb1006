"""`jaxllm run-batch`: OpenAI's batch files."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxllm.cli.options import engine_options, server_options
from jaxllm.errors import ConfigError

SERVER = (
    "served_model_name", "chat_template", "tool_call_parser", "enable_auto_tool_choice", "reasoning_parser", "max_n",
    "max_prompts", "max_logprobs", "request_timeout",
)  # fmt: skip


@server_options(only=SERVER)
@engine_options(without=("model", "engine_process"))
def run_batch(
    *,
    input_file: Annotated[Path, typer.Option("--input-file", "-i", help="JSONL file of requests")],
    output_file: Annotated[
        Path, typer.Option("--output-file", "-o", help="JSONL file of answers; goes on where it ends")
    ],
    model: Annotated[str, typer.Option(help="'smollm2', a Hugging Face directory or id, or a .gguf file")] = "smollm2",
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="requests at a time (default: twice what the engine runs at once)")
    ] = None,
    server: dict,
    engine: dict,
) -> None:
    """Answer every request of a batch file. Run it again after an interruption, and it does what is missing."""
    from jaxllm.cli.start import follow_if_asked

    follow_if_asked(model, engine)
    if not input_file.is_file():
        raise ConfigError(f"input_file={str(input_file)!r}: no such file")
    if input_file.resolve() == output_file.resolve():
        raise ConfigError(f"output_file={str(output_file)!r}: is the input file")
    tally = asyncio.run(_run(model, input_file, output_file, max_concurrency, server, engine))
    print(f"{tally.good} answered, {tally.failed} refused", file=sys.stderr)


async def _run(
    model: str, source: Path, target: Path, concurrency: int | None, server: dict[str, Any], engine: dict[str, Any]
) -> Any:
    from jaxllm.async_llm import AsyncLLM
    from jaxllm.cli.start import shows_progress
    from jaxllm.serving.app import check, make_services
    from jaxllm.serving.batch import OutputFile, Tally, run_batch
    from jaxllm.serving.config import ServerConfig

    config = ServerConfig(**server, max_queued_requests=1 << 30, max_queued_tokens=1 << 60)
    check(config)
    with OutputFile(target) as output:  # before the engine: it may be another process's
        async with AsyncLLM(model, max_concurrent_requests=1 << 20, **engine) as llm:
            services, concurrent = make_services(llm, config), concurrency or 2 * llm.max_num_seqs
            if not shows_progress():
                return await run_batch(services, source, output, concurrent)
            from rich import console, progress

            columns = ("{task.description}", progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
            with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
                task = bar.add_task("requests", total=None)

                def show(tally: Tally) -> None:
                    bar.update(task, completed=tally.good + tally.failed)

                return await run_batch(services, source, output, concurrent, show)

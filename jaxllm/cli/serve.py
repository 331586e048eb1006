"""`jaxllm serve`: an OpenAI-compatible server."""

import asyncio
from typing import Annotated

import typer

from jaxllm.cli.options import engine_options, server_options


@server_options()
@engine_options(without=("model", "engine_process"))
def serve(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="the same as --model")] = None,
    *,
    model: Annotated[str, typer.Option(help="'smollm2', a Hugging Face directory or id, or a .gguf file")] = "smollm2",
    server: dict,
    engine: dict,
) -> None:
    """Serve a model over HTTP with OpenAI's API and a chat page at /."""
    import uvloop

    from jaxllm.cli.start import follow_if_asked
    from jaxllm.serving.config import ServerConfig
    from jaxllm.serving.log import set_up_logging
    from jaxllm.serving.server import serve as run

    config = ServerConfig(**server)
    set_up_logging(config.log_level, config.log_format)
    follow_if_asked(name or model, engine)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status = runner.run(run(name or model, config, engine))
    raise SystemExit(status)

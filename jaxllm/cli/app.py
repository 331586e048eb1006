"""The commands, put together."""

import typer

from jaxllm.cli import bench
from jaxllm.cli.chat import chat
from jaxllm.cli.convert import convert
from jaxllm.cli.generate import generate
from jaxllm.cli.plan import plan
from jaxllm.cli.run_batch import run_batch
from jaxllm.cli.serve import serve
from jaxllm.cli.top import top

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.command()(generate)
app.command()(chat)
app.command()(plan)
app.command()(convert)
app.command()(serve)
app.command("run-batch")(run_batch)
app.command()(top)
app.add_typer(bench.app, name="bench")


@app.callback()
def root() -> None:
    """LLM inference and serving on JAX."""

"""The commands, put together."""

import typer

from jaxllm.cli import bench

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(bench.app, name="bench")


@app.callback()
def root() -> None:
    """LLM inference and serving on JAX."""

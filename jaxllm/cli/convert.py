"""`jaxllm convert`: a checkpoint in the engine's own layout."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    model: Annotated[str, typer.Argument(help="a Hugging Face directory or id, with safetensors")],
    directory: Annotated[Path, typer.Argument(help="what to write; must not exist, or be empty and no mount point")],
    *,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a Hugging Face id")] = None,
) -> None:
    """Write a model as an Orbax checkpoint that loads at the disk's speed onto any number of devices."""
    import logging

    from jaxllm.checkpoint import open_checkpoint
    from jaxllm.engine import platform
    from jaxllm.models.convert import convert as write
    from jaxllm.models.convert import drafts

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what it was not asked to do
    platform.configure()
    for left in drafts(directory):
        typer.echo(f"{left}: left by a conversion that was killed; unless one is running now, remove it", err=True)
    write(open_checkpoint(model, revision), directory)
    typer.echo(f"{directory}: written; jaxllm serve {directory}")

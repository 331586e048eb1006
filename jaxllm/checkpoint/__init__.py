"""Checkpoints: where a model's configuration, weights and tokenizer come from. No JAX in here."""

import os

from jaxllm.checkpoint.base import Checkpoint
from jaxllm.checkpoint.resolve import DEFAULT_MODEL, resolve

__all__ = ["DEFAULT_MODEL", "Checkpoint", "open_checkpoint", "resolve"]


def open_checkpoint(model: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True) -> Checkpoint:
    """Opens a model's checkpoint: its config is read, its tensors are not.

    Args:
      model: "smollm2" (the default model), a directory of Hugging Face's or of `jaxllm convert`'s, a .gguf file or a
        Hugging Face id.
      revision: a branch, tag or commit of a Hugging Face id.
      weights: of a Hugging Face id, download the weights too; without them it still serves for random ones.

    Raises:
      ModelNotFoundError: there is no such model, or the hub cannot be reached.
      CheckpointError: a file is corrupt, truncated or missing.
      UnsupportedModelError: a format, architecture or tensor type that jaxllm does not read.
    """
    path = resolve(model, revision, weights=weights)
    if path.is_dir() and not (path / "config.json").is_file():
        files = list(path.glob("*.gguf"))
        path = files[0] if len(files) == 1 else path
    if path.is_dir() and ((path / "weights").is_dir() or (path / "weights.json").is_file()):
        from jaxllm.checkpoint.orbax_source import OrbaxCheckpoint

        return OrbaxCheckpoint(path)
    if path.is_dir():
        from jaxllm.checkpoint.safetensors_source import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    from jaxllm.checkpoint.gguf_source import GgufCheckpoint

    return GgufCheckpoint(path)

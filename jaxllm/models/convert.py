"""Writes a checkpoint as the engine keeps it: see `jaxllm.checkpoint.orbax_source`."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.base import Checkpoint
from jaxllm.checkpoint.orbax_source import MANIFEST, WEIGHTS, StoredArray, stored_files, write_manifest
from jaxllm.checkpoint.safetensors_source import SafetensorsCheckpoint
from jaxllm.errors import ConfigError, UnsupportedModelError
from jaxllm.models.loader import check, parameters_of
from jaxllm.models.registry import model_class
from jaxllm.models.sources import Parts

FLOATS = ("bfloat16", "float16", "float32", "float64")


def drafts(directory: Path) -> list[Path]:
    """What conversions to this directory have left where they were killed, or are writing."""
    directory = directory.resolve()
    if not directory.parent.is_dir():
        return []
    return sorted(path for path in directory.parent.iterdir() if path.name.startswith(_draft_prefix(directory)))


def _draft_prefix(directory: Path) -> str:
    return f".{directory.name}.incomplete-"


def convert(checkpoint: Checkpoint, directory: Path) -> None:
    """Writes a model's weights, configuration and tokenizer files into a new directory.

    All of it is written beside `directory` and renamed at the end, so that what bears the name is whole.

    Args:
      checkpoint: an opened safetensors checkpoint.
      directory: must not exist, or be empty and no mount point.

    Raises:
      UnsupportedModelError: it is no safetensors checkpoint, it is quantized, or of a family that jaxllm does not know.
      CheckpointError: tensors do not fit the model.
      ConfigError: there is something in `directory`, or it cannot be made.
    """
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise UnsupportedModelError(
            f"{checkpoint.path}: only Hugging Face directories with safetensors are converted; a GGUF file's tensors "
            "are quantized, and an Orbax checkpoint is converted already"
        )
    given, directory = directory, directory.resolve()  # what is renamed to may be neither "." nor a link
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ConfigError(f"directory={str(given)!r}: exists")
    if directory.is_mount():
        raise ConfigError(f"directory={str(given)!r}: must be no mount point; name a directory in it")
    family = model_class(checkpoint.config)
    model = family(family.parse_config(checkpoint.config), dtype=jnp.float32)
    parts = [Parts(path, parameter) for path, parameter in parameters_of(model)]
    expected = {index: each.tensors() for index, each in enumerate(parts)}
    check(expected, checkpoint, tied=getattr(model, "lm_head", True) is None)
    write_arrays = _writer()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=_draft_prefix(directory), dir=directory.parent))
    except OSError as error:
        raise ConfigError(f"directory={str(given)!r}: cannot be made: {error}") from error
    try:
        values, arrays = _slices(checkpoint, parts)
        write_arrays(draft / WEIGHTS, arrays, values)
        for file in stored_files(checkpoint.path):
            if file.name != MANIFEST:
                shutil.copyfile(file, draft / file.name)
        write_manifest(draft, arrays)
        draft.chmod(0o777 & ~_umask())
        os.rename(draft, directory)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _slices(
    checkpoint: SafetensorsCheckpoint, parts: list[Parts]
) -> tuple[dict[str, np.ndarray], dict[str, StoredArray]]:
    """Views of the files' tensors, and how they are to be stored. Raises UnsupportedModelError for quantized ones."""
    values: dict[str, np.ndarray] = {}
    arrays: dict[str, StoredArray] = {}
    for each in parts:
        for source, stored in zip(each.sources, each.converted().sources, strict=True):
            tensor = checkpoint.read(source.name)[source.start : source.start + source.width]
            if tensor.dtype.name not in FLOATS:
                limit = f"tensor {source.name!r} is quantized ({tensor.dtype.name})"
                raise UnsupportedModelError(f"{checkpoint.path}: {limit}")
            values[stored.name] = tensor
            arrays[stored.name] = StoredArray(tensor.shape, tensor.dtype, each.joined_axis != 0, each.dealt_axis)
    return values, arrays


def _writer() -> Callable[[Path, Mapping[str, StoredArray], Mapping[str, np.ndarray]], None]:
    """Raises UnsupportedModelError."""
    try:
        from jaxllm.checkpoint.orbax_writer import write_arrays  # here: Orbax takes seconds to import
    except ImportError as error:
        raise UnsupportedModelError(f"Orbax checkpoints need the extra orbax: {error}") from error
    return write_arrays


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found

"""Writes a checkpoint as the engine keeps it: see `jaxllm.checkpoint.orbax_source`."""

import os
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint.base import Checkpoint
from jaxllm.checkpoint.orbax_source import MANIFEST, WEIGHTS, StoredArray, stored_files, write_manifest
from jaxllm.checkpoint.safetensors_source import SafetensorsCheckpoint
from jaxllm.errors import ConfigError, UnsupportedModelError
from jaxllm.models.loader import check, parameters_of
from jaxllm.models.registry import model_class
from jaxllm.models.restore import make_checkpointer
from jaxllm.models.sources import Parts

FLOATS = ("bfloat16", "float16", "float32", "float64")
CHUNK_BYTES = 16 << 20  # of a file: enough for a disk's full speed, small enough for shards to read their own


def convert(checkpoint: Checkpoint, directory: Path) -> None:
    """Writes a model's weights, configuration and tokenizer files into a new directory.

    All of it is written beside `directory` and renamed at the end, so that what bears the name is whole.

    Args:
      checkpoint: an opened safetensors checkpoint.
      directory: must not exist, or be empty.

    Raises:
      UnsupportedModelError: it is no safetensors checkpoint, it is quantized, or of a family that jaxllm does not know.
      CheckpointError: tensors do not fit the model.
      ConfigError: there is something in `directory`.
    """
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise UnsupportedModelError(
            f"{checkpoint.path}: only Hugging Face directories with safetensors are converted; a GGUF file's tensors "
            "are quantized, and an Orbax checkpoint is converted already"
        )
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ConfigError(f"directory={str(directory)!r}: exists")
    family = model_class(checkpoint.config)
    model = family(family.parse_config(checkpoint.config), dtype=jnp.float32)
    targets = [(parameter, Parts(path, parameter)) for path, parameter in parameters_of(model)]
    check(
        {index: parts.tensors() for index, (_, parts) in enumerate(targets)},
        checkpoint,
        tied=getattr(model, "lm_head", True) is None,
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}.incomplete-", dir=directory.parent))
    try:
        arrays = _arrays(checkpoint, [parts for _, parts in targets])
        _save(draft / WEIGHTS, arrays)
        for file in stored_files(checkpoint.path):
            if file.name != MANIFEST:
                shutil.copyfile(file, draft / file.name)
        stored = {name: StoredArray(array.shape, array.dtype) for name, array in arrays.items()}
        write_manifest(draft, stored)
        draft.chmod(0o777 & ~_umask())
        os.rename(draft, directory)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _arrays(checkpoint: SafetensorsCheckpoint, parts: list[Parts]) -> dict[str, np.ndarray]:
    """Views of the files' tensors, turned as they are to be stored. Raises UnsupportedModelError for quantized ones."""
    found: dict[str, np.ndarray] = {}
    for each in parts:
        for name, source in zip(each.stored_names(), each.sources, strict=True):
            tensor = checkpoint.read(source.name)[source.start : source.start + source.width]
            if tensor.dtype.name not in FLOATS:
                limit = f"tensor {source.name!r} is quantized ({tensor.dtype.name})"
                raise UnsupportedModelError(f"{checkpoint.path}: {limit}")
            found[name] = tensor if each.joined_axis == 0 else tensor.T
    return found


def _save(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp  # here: see make_checkpointer

    options = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in arrays}
    make_checkpointer().save(directory, args=ocp.args.PyTreeSave(arrays, save_args=options))


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found

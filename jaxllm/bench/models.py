"""Models for benchmarks: anything that `LLM` takes, and `shape:NAME` for random weights of a well-known shape."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.bench.workloads import MODEL_SHAPES
from jaxllm.errors import ModelNotFoundError
from jaxllm.models.registry import ARCHITECTURES

PREFIX = "shape:"
SHAPE_MAX_MODEL_LEN = 18432  # tokens; what the peers' figures were taken with


@contextlib.contextmanager
def bench_model(model: str, options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to call `LLM` with: (model, options).

    `shape:NAME` becomes a temporary directory with the config.json of `MODEL_SHAPES[NAME]`, load_format="dummy", and
    max_model_len=18432 unless an option says otherwise.

    Raises:
      ModelNotFoundError: no such shape.
    """
    if not model.startswith(PREFIX):
        yield model, options
        return
    name = model.removeprefix(PREFIX)
    if name not in MODEL_SHAPES:
        served = [name for name, hf in MODEL_SHAPES.items() if hf["architectures"][0] in ARCHITECTURES]
        raise ModelNotFoundError(f"model={model!r}: the shapes are {', '.join(served)}")
    with tempfile.TemporaryDirectory(prefix="jaxllm-bench-") as directory:
        Path(directory, "config.json").write_text(json.dumps(MODEL_SHAPES[name]))
        length = min(SHAPE_MAX_MODEL_LEN, MODEL_SHAPES[name]["max_position_embeddings"])
        yield directory, {"max_model_len": length, **options, "load_format": "dummy"}


def model_name(model: str) -> str:
    """A model's name in results: without the prefix of a shape, and of a file or directory its last part alone."""
    return Path(model).name if Path(model).exists() else model.removeprefix(PREFIX)

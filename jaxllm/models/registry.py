"""Which class serves which architecture. One line a family; modules are imported when asked for."""

import importlib
from collections.abc import Mapping
from typing import Any

from jaxllm.errors import UnsupportedModelError

ARCHITECTURES = {
    "LlamaForCausalLM": "jaxllm.models.llama",
}


def model_class(hf_config: Mapping[str, Any]):
    """The model class for the contents of a config.json. Raises UnsupportedModelError naming what is supported."""
    architectures = hf_config.get("architectures") or []
    for name in architectures:
        if name in ARCHITECTURES:
            return getattr(importlib.import_module(ARCHITECTURES[name]), name)
    raise UnsupportedModelError(
        f"architectures={architectures!r} are not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
    )

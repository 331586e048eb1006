"""Which class serves which architecture. One line a family; modules are imported when asked for."""

import importlib
from collections.abc import Mapping
from typing import Any

from jaxllm.errors import UnsupportedModelError

ARCHITECTURES = {
    "Gemma2ForCausalLM": "jaxllm.models.gemma2",
    "Gemma3ForCausalLM": "jaxllm.models.gemma3",
    "LlamaForCausalLM": "jaxllm.models.llama",
    "MistralForCausalLM": "jaxllm.models.mistral",
    "Phi3ForCausalLM": "jaxllm.models.phi3",
    "Qwen2ForCausalLM": "jaxllm.models.qwen2",
    "Qwen3ForCausalLM": "jaxllm.models.qwen3",
}

# Refused for a reason better than an unknown name.
REFUSED = {"Gemma3ForConditionalGeneration": "it takes images; the models of text alone are Gemma3ForCausalLM"}


def model_class(hf_config: Mapping[str, Any]):
    """The model class for the contents of a config.json. Raises UnsupportedModelError naming what is supported."""
    architectures = hf_config.get("architectures") or []
    for name in architectures:
        if name in ARCHITECTURES:
            return getattr(importlib.import_module(ARCHITECTURES[name]), name)
        if name in REFUSED:
            raise UnsupportedModelError(f"architecture {name!r} is not supported: {REFUSED[name]}")
    raise UnsupportedModelError(
        f"architectures={architectures!r} are not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
    )

"""jaxllm: LLM inference and serving on JAX, for TPUs, NVIDIA GPUs and CPUs. This module is the public API."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.async_llm import AsyncLLM
    from jaxllm.config import EngineConfig
    from jaxllm.core.pooling_params import PoolingParams
    from jaxllm.core.sampling_params import SamplingParams
    from jaxllm.core.structured_outputs import StructuredOutputsParams
    from jaxllm.frontend.beam_search import BeamSearchParams
    from jaxllm.frontend.inputs import TokensPrompt
    from jaxllm.frontend.outputs import CompletionOutput, Logprob, RequestOutput
    from jaxllm.llm import LLM

__version__ = "0.1.0"

_HOMES = {  # imported when first touched, so that `import jaxllm` costs nothing
    "LLM": "jaxllm.llm",
    "AsyncLLM": "jaxllm.async_llm",
    "PoolingParams": "jaxllm.core.pooling_params",
    "SamplingParams": "jaxllm.core.sampling_params",
    "StructuredOutputsParams": "jaxllm.core.structured_outputs",
    "BeamSearchParams": "jaxllm.frontend.beam_search",
    "TokensPrompt": "jaxllm.frontend.inputs",
    "EngineConfig": "jaxllm.config",
    "RequestOutput": "jaxllm.frontend.outputs",
    "CompletionOutput": "jaxllm.frontend.outputs",
    "Logprob": "jaxllm.frontend.outputs",
}
__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TokensPrompt",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value

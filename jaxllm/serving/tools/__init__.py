"""Tool calls in a model's text, by vLLM's names of their parsers."""

from jaxllm.errors import ConfigError
from jaxllm.serving.tools.base import ToolParser
from jaxllm.serving.tools.hermes import HermesParser
from jaxllm.serving.tools.llama3_json import Llama3JsonParser
from jaxllm.serving.tools.mistral import MistralParser
from jaxllm.serving.tools.pythonic import PythonicParser

PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "qwen": HermesParser,
    "llama3_json": Llama3JsonParser,
    "llama4_json": Llama3JsonParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
    "llama4_pythonic": PythonicParser,
}


def tool_parser(name: str) -> type[ToolParser]:
    """The parser of that name. Raises ConfigError for others."""
    if name not in PARSERS:
        raise ConfigError(f"tool_call_parser={name!r}: must be one of {', '.join(sorted(PARSERS))}")
    return PARSERS[name]

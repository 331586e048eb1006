"""POST /v1/completions."""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from jaxllm.serving.protocol.base import Refusal
from jaxllm.serving.protocol.common import Sampling

PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


def prompts(value: Any) -> list[str] | list[list[int]]:
    """One prompt or several, text or token ids, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(_token(item) for item in value):
            return [value]
        if all(isinstance(item, list) and all(_token(token) for token in item) for item in value):
            return value
    raise PydanticCustomError("prompt", "must be a string, a list of token ids, or a non-empty list of one of them")


def _token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class CompletionRequest(Sampling):
    """A request for completions; `prompt` is validated into a list of prompts."""

    prompt: Annotated[Any, BeforeValidator(prompts), WithJsonSchema(PROMPT_SCHEMA)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    REFUSED: ClassVar = {
        "suffix": Refusal("the model is not asked to fill in the middle", ""),
        "best_of": Refusal("is not supported; use n", 1),
        "prompt_embeds": Refusal("prompts are text or token ids"),
    }

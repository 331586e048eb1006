"""POST /tokenize and /detokenize, as in vLLM."""

from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from jaxllm.serving.protocol.base import Strict, Text
from jaxllm.serving.protocol.chat import ChatMessage
from jaxllm.serving.protocol.tools import Tool


class TokenizeRequest(Strict):
    """Either `prompt` or `messages`. add_special_tokens: default true for a prompt, false for a conversation."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "needs either 'prompt' or 'messages'")
        return self


class DetokenizeRequest(Strict):
    """Token ids to text, special tokens included."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**63)]]

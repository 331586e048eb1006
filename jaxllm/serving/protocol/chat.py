"""POST /v1/chat/completions."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from jaxllm.serving.protocol.base import Refusal, Strict, Text
from jaxllm.serving.protocol.common import Sampling
from jaxllm.serving.protocol.tools import Tool, ToolCall, ToolChoice

_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": _PART}]}
TEXT_PARTS = ("text", "input_text", "output_text")


def content_text(value: Any) -> str | None:
    """A message's content as one text: parts are joined by newlines, as vLLM does for templates that want text."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS:
            raise PydanticCustomError(
                "unsupported", "content of type {kind} is not supported: text only", {"kind": repr(kind)}
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content", "a text part needs 'text', a string")
        known = {"type", "text", "annotations", "logprobs"} if kind == "output_text" else {"type", "text"}
        if set(part) - known:
            raise PydanticCustomError("unknown_field", "unknown field {name}", {"name": repr(min(set(part) - known))})
        texts.append(part["text"])
    return "\n".join(texts)


Content = Annotated[Any, BeforeValidator(content_text), WithJsonSchema(_CONTENT_SCHEMA)]


class ChatMessage(Strict):
    """One message. An assistant's may be sent back just as it came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    type: Literal["text", "message"] | None = None  # some clients say so
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None
    provider_specific_fields: dict[str, Any] | None = None  # litellm's; changes nothing
    REFUSED: ClassVar = {
        "annotations": Refusal("the model does not see them", []),
        "audio": Refusal("text only"),
        "function_call": Refusal("is deprecated; use tool_calls"),
    }


class ChatRequest(Sampling):
    """A request for a chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    # vLLM's
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None

    REFUSED: ClassVar = {
        "echo": Refusal("the conversation is not repeated", False),
        "chat_template": Refusal("templates come from the operator: --chat-template"),
        "documents": Refusal("put documents into the messages", []),
        "functions": Refusal("is deprecated; use tools", []),
        "function_call": Refusal("is deprecated; use tool_choice", "none", "auto"),
        "modalities": Refusal("text only", ["text"]),
        "audio": Refusal("text only"),
        "prediction": Refusal("predicted outputs are not supported"),
        "store": Refusal("nothing is stored", False),
        "prompt_cache_retention": Refusal("prefixes are cached while there is room"),
        "service_tier": Refusal("there is one tier", "auto", "default"),
        "web_search_options": Refusal("there is no web search"),
        "verbosity": Refusal("is not supported", "medium"),
        "mm_processor_kwargs": Refusal("text only"),
    }

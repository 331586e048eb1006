"""A chat request's messages to the prompt that the model's template makes of them."""

import asyncio
import json
from typing import Any

from jaxllm.errors import InvalidRequestError
from jaxllm.serving.errors import refuse
from jaxllm.serving.protocol.chat import ChatMessage
from jaxllm.serving.protocol.tools import Tool
from jaxllm.serving.sampling import INLINE_CHARACTERS
from jaxllm.serving.services import Services


def template_message(message: ChatMessage, position: int) -> dict[str, Any]:
    """A message as templates expect it: calls' arguments are objects, a developer is the system."""
    found: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.content if message.content is not None else message.refusal or "",
    }
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if reasoning is not None:
        found["reasoning"] = found["reasoning_content"] = reasoning
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments, position)},
            }
            for call in message.tool_calls
        ]
    return found


def _arguments(text: str, position: int) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        field = f"messages[{position}].tool_calls"
        raise refuse(field, text, "a call's arguments must be the JSON text of an object")
    return value


async def render(
    services: Services,
    messages: list[ChatMessage],
    tools: list[Tool] | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: dict[str, Any] | None = None,
) -> str:
    """The conversation under the template, as text. Raises ApiError or InvalidRequestError.

    continue_final_message: the prompt ends with the last message's content, without what the template puts after it.
    """
    if continue_final_message and add_generation_prompt:
        raise refuse("continue_final_message", True, "needs add_generation_prompt=false")
    for name in variables or {}:
        if name in ("messages", "tools", "documents", "add_generation_prompt"):
            raise refuse(f"chat_template_kwargs.{name}", "…", "is a field of the request itself")
    plain = [template_message(message, position) for position, message in enumerate(messages)]
    schemas = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools or []]
    tokenizer = services.llm.get_tokenizer()

    def make() -> str:
        return tokenizer.apply_chat_template(
            plain, schemas, add_generation_prompt, services.chat_template, dict(variables or {})
        )

    length = sum(len(message["content"]) + 20 for message in plain)
    short = length <= INLINE_CHARACTERS and not (schemas or variables or any("tool_calls" in item for item in plain))
    text = make() if short else await asyncio.to_thread(make)
    if continue_final_message:
        last = plain[-1]["content"].strip()
        cut = text.rfind(last)
        if cut < 0 or not last:
            raise InvalidRequestError("continue_final_message", True, "the template does not show the last message")
        text = text[: cut + len(last)]
    return text

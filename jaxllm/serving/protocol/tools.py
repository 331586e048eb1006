"""Tools that the model may call, and the calls that it made."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from jaxllm.serving.protocol.base import Strict, Text

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.\-]+$")]


class Function(Strict):
    """A function that the model may call; `parameters` is its JSON schema, which calls have to fit if `strict`."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool of a chat."""

    type: Literal["function"]
    function: Function


class FunctionCall(Strict):
    """What the model called; `arguments` is JSON text."""

    name: Text
    arguments: Text
    provider_specific_fields: dict[str, Any] | None = None  # litellm's; changes nothing


class ToolCall(Strict):
    """A call in an assistant's message."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None
    provider_specific_fields: dict[str, Any] | None = None  # litellm's; changes nothing


def _choice(value: Any) -> str | None:
    """ "none", "auto", "required", or a function's name as "function:NAME"."""
    if value is None or value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict) and value.get("type") == "function" and set(value) <= {"type", "function", "name"}:
        named = value.get("function", value)
        if isinstance(named, dict) and isinstance(named.get("name"), str) and set(named) <= {"type", "name"}:
            return f"function:{named['name']}"
    raise PydanticCustomError("tool_choice", "must be 'none', 'auto', 'required' or a named function")


_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
            },
            "required": ["type", "function"],
        },
    ]
}
ToolChoice = Annotated[Any, BeforeValidator(_choice), WithJsonSchema(_CHOICE_SCHEMA)]

"""POST /v1/responses."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from jaxllm.serving.protocol.base import Refusal, Strict, Text
from jaxllm.serving.protocol.chat import ChatMessage, ChatRequest, Content
from jaxllm.serving.protocol.common import Count, Generating
from jaxllm.serving.protocol.structure import TextFormat
from jaxllm.serving.protocol.tools import Function, FunctionCall, Name, Tool, ToolCall, ToolChoice

LOGPROBS = "message.output_text.logprobs"
_STATUS = Literal["in_progress", "completed", "incomplete"]


class InputMessage(Strict):
    """A message of either side; the assistant's may be sent back as they came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: Text | None = None
    status: _STATUS | None = None
    phase: Text | None = None


class InputCall(Strict):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text
    id: Text | None = None
    status: _STATUS | None = None


class InputCallOutput(Strict):
    """What the call brought."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Content
    id: Text | None = None
    status: _STATUS | None = None


class InputReasoning(Strict):
    """What the model thought; it goes with the assistant's message or call that follows."""

    type: Literal["reasoning"]
    id: Text | None = None
    summary: list[Any] | None = None
    content: list[dict[str, Any]] | None = None
    status: _STATUS | None = None
    REFUSED: ClassVar = {"encrypted_content": Refusal("reasoning is not encrypted here")}

    def text(self) -> str:
        """All of it."""
        return "\n".join(str(part.get("text", "")) for part in self.content or [])


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else "message"


def _items(value: Any) -> Any:
    """A text is a user's message. Kinds of items that are not supported are refused by name."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if isinstance(value, list):
        for item in value:
            if _kind(item) not in ("message", "function_call", "function_call_output", "reasoning"):
                raise PydanticCustomError(
                    "unsupported", "items of type {kind} are not supported", {"kind": _kind(item)}
                )
    return value


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]
_INPUT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": InputMessage.model_json_schema(), "minItems": 1}]
}


class ResponseTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Reasoning(Strict):
    """`reasoning`."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    REFUSED: ClassVar = {
        "summary": Refusal("the reasoning comes whole", "auto"),
        "generate_summary": Refusal("the reasoning comes whole"),
    }


class TextOptions(Strict):
    """`text`."""

    format: TextFormat | None = None
    REFUSED: ClassVar = {"verbosity": Refusal("is not supported", "medium")}


class ResponsesRequest(Generating):
    """A request for a response. Nothing is stored: what came before goes into `input`."""

    input: Annotated[list[Item], Field(min_length=1), BeforeValidator(_items), WithJsonSchema(_INPUT_SCHEMA)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's

    REFUSED: ClassVar = {
        "store": Refusal("nothing is stored", False),
        "previous_response_id": Refusal("nothing is stored: send the conversation as input"),
        "conversation": Refusal("nothing is stored: send the conversation as input"),
        "background": Refusal("is not supported", False),
        "prompt": Refusal("there are no stored prompts"),
        "truncation": Refusal("input is never cut", "disabled"),
        "service_tier": Refusal("there is one tier", "auto", "default"),
        "max_tool_calls": Refusal("tools are the client's to call"),
        "stream_options": Refusal("chunks are not padded", {"include_obfuscation": False}),
        "prompt_cache_retention": Refusal("prefixes are cached while there is room"),
    }

    def chat(self) -> ChatRequest:
        """The same as a chat."""
        same = {*Generating.model_fields, "tool_choice", "parallel_tool_calls", "chat_template_kwargs"}
        tools = [
            Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in self.tools or []
        ]
        logprobs = LOGPROBS in (self.include or ())
        return ChatRequest.model_construct(
            **{name: getattr(self, name) for name in same},
            messages=self.messages(),
            tools=tools or None,
            max_completion_tokens=self.max_output_tokens,
            response_format=self.text.format.response_format() if self.text is not None and self.text.format else None,
            logprobs=logprobs,
            top_logprobs=self.top_logprobs if logprobs else None,
            reasoning_effort=self.reasoning.effort if self.reasoning is not None else None,
        )

    def messages(self) -> list[ChatMessage]:
        """The items as a conversation: calls and reasoning join the assistant's message around them."""
        found: list[ChatMessage] = []
        if self.instructions is not None:
            found.append(ChatMessage(role="system", content=self.instructions))
        thought: str | None = None
        for item in self.input:
            if isinstance(item, InputReasoning):
                thought = item.text()
            elif isinstance(item, InputMessage):
                assistant = item.role == "assistant"
                found.append(
                    ChatMessage(role=item.role, content=item.content, reasoning=thought if assistant else None)
                )
                thought = None if assistant else thought
            elif isinstance(item, InputCallOutput):
                found.append(ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id))
            else:
                call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
                if found and found[-1].role == "assistant":
                    found[-1].tool_calls = [*(found[-1].tool_calls or []), call]
                else:
                    found.append(ChatMessage(role="assistant", tool_calls=[call], reasoning=thought))
                    thought = None
        return found

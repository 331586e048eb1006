"""Chats: a request to a prompt and parameters, and the parser of its answer."""

from typing import Any

from jaxllm.serving.chat_answer import ChatAnswer, Wishes
from jaxllm.serving.context import Context
from jaxllm.serving.conversation import render
from jaxllm.serving.errors import refuse
from jaxllm.serving.generation import Generation
from jaxllm.serving.protocol.chat import ChatRequest
from jaxllm.serving.reasoning import ReasoningParser, reasoning_style
from jaxllm.serving.sampling import encode, sampling_params, truncate
from jaxllm.serving.services import Services
from jaxllm.serving.text_parser import TextParser
from jaxllm.serving.tools import ToolParser, tool_parser


def chosen_tools(services: Services, body: ChatRequest) -> tuple[type[ToolParser] | None, str | None]:
    """(the parser of calls or None, how the answer is made to begin). Raises ApiError."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none"):
            raise refuse("tool_choice", choice, "needs tools")
        return None, None
    if choice == "none":
        return None, None
    name = services.config.tool_call_parser
    if name is None:
        raise refuse("tools", f"{len(body.tools)} tools", "start the server with --tool-call-parser to use tools")
    parser = tool_parser(name)
    names = [tool.function.name for tool in body.tools]
    if choice is not None and choice.startswith("function:"):
        wanted = choice.removeprefix("function:")
        if wanted not in names:
            raise refuse("tool_choice", wanted, f"is none of the tools {', '.join(names)}")
        return parser, parser.forced(wanted)
    return parser, parser.forced(None) if choice == "required" else None


async def chat(services: Services, context: Context, body: ChatRequest) -> ChatAnswer:
    """An answer whose generation has not been started. Raises ApiError or any of jaxllm.errors."""
    model = services.model(body.model)
    parser, forced = chosen_tools(services, body)
    own: dict[str, Any] = {}
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise refuse("max_tokens", body.max_tokens, "is the old name of max_completion_tokens; give one")
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    own["max_tokens"] = asked if asked is not None else _default_max_tokens(services)
    if body.top_logprobs is not None and not body.logprobs:
        raise refuse("top_logprobs", body.top_logprobs, "needs logprobs=true")
    if body.logprobs:
        own["logprobs"] = body.top_logprobs or 0
    if parser is not None and parser.special_tokens:
        own["skip_special_tokens"] = False
    params = sampling_params(services, body, **own)
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
    text = await render(
        services,
        body.messages,
        body.tools if body.tool_choice != "none" else None,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=variables,
    )
    prompt = await encode(services, text + (forced or ""), bool(body.add_special_tokens))
    prompt = truncate(services, prompt, body, params.max_tokens)
    style = services.config.reasoning_parser
    style_found = None if style is None or forced else reasoning_style(style)

    def text_parser() -> TextParser | None:
        if parser is None and style_found is None:
            return None
        reasoning = ReasoningParser(style_found, text) if style_found is not None else None
        return TextParser(reasoning, parser() if parser is not None else None, forced or "")

    generation = Generation(
        services, context, [prompt], params, body.priority or 0, context.cache_salt(body.cache_salt)
    )
    wishes = Wishes(
        request_id=body.request_id or context.request_id,
        stream=bool(body.stream),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        as_ids=bool(body.return_tokens_as_token_ids),
        token_ids=bool(body.return_token_ids),
        prompt_logprobs=body.prompt_logprobs is not None,
        usage=bool(body.stream_options and body.stream_options.include_usage),
        usage_always=bool(body.stream_options and body.stream_options.continuous_usage_stats),
        reasoning=body.include_reasoning is not False,
        one_call=body.parallel_tool_calls is False,
        named=isinstance(body.tool_choice, str) and body.tool_choice.startswith("function:"),
    )
    return ChatAnswer(services, model, wishes, prompt, generation, text_parser)


def _default_max_tokens(services: Services) -> int | None:
    """The model's max_new_tokens, where its generation_config has one; else as many as fit."""
    configured = services.llm.builder.default_params().max_tokens
    return None if configured == 16 else configured

"""Chats: a request to a prompt and parameters, and the parser of its answer."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.errors import InvalidRequestError
from jaxllm.serving.chat_answer import ChatAnswer, Wishes
from jaxllm.serving.context import Context
from jaxllm.serving.conversation import render
from jaxllm.serving.errors import api_error, refuse
from jaxllm.serving.forms import mark_of, special_token
from jaxllm.serving.generation import Generation
from jaxllm.serving.protocol.chat import ChatRequest
from jaxllm.serving.reasoning import ReasoningParser, ReasoningStyle, first_stage, reasoning_style
from jaxllm.serving.sampling import check_length, encode, sampling_params, truncate
from jaxllm.serving.services import Services
from jaxllm.serving.structure import after_reasoning, asked_structure, whole
from jaxllm.serving.text_parser import TextParser
from jaxllm.serving.tool_choice import ToolUse, tool_use


@dataclasses.dataclass(frozen=True)
class FieldNames:
    """An endpoint's own names: of the answer's form, and of a tool's parameters ({} stands for its number)."""

    form: str = "response_format"
    parameters: str = "tools[{}].function.parameters"


@dataclasses.dataclass
class PreparedChat:
    """A chat that has been let in and not been started.

    Attributes:
      model: its name in the answer.
      prompt: the conversation's token ids.
      text_parser: makes the parser of one choice's text; None for plain text.
    """

    model: str
    prompt: list[int]
    generation: Generation
    text_parser: Callable[[], TextParser | None]


async def chat(services: Services, context: Context, body: ChatRequest) -> ChatAnswer:
    """An answer whose generation has not been started. Raises ApiError or any of jaxllm.errors."""
    try:
        prepared = await prepare(services, context, body)
    except InvalidRequestError as error:
        names = {} if body.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        raise api_error(error, names) from error
    options = body.stream_options
    wishes = Wishes(
        request_id=body.request_id or context.request_id,
        stream=bool(body.stream),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        as_ids=bool(body.return_tokens_as_token_ids),
        token_ids=bool(body.return_token_ids),
        prompt_logprobs=body.prompt_logprobs is not None,
        usage=bool(options and options.include_usage),
        usage_always=bool(options and options.continuous_usage_stats),
        reasoning=body.include_reasoning is not False,
        one_call=body.parallel_tool_calls is False,
        named=isinstance(body.tool_choice, str) and body.tool_choice.startswith("function:"),
    )
    return ChatAnswer(services, prepared.model, wishes, prepared.prompt, prepared.generation, prepared.text_parser)


async def prepare(
    services: Services, context: Context, body: ChatRequest, names: FieldNames = FieldNames()
) -> PreparedChat:
    """Renders and checks a chat, and lets it in. Raises ApiError or any of jaxllm.errors."""
    model = services.model(body.model)
    tools = tool_use(services, body, asked_structure(body, names.form), names.parameters)
    style = None if services.config.reasoning_parser is None else reasoning_style(services.config.reasoning_parser)
    params = _params(services, body, tools, style)
    services.admission.check(params.n)
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
    (prompt,) = await encode(services, [text], bool(body.add_special_tokens))
    prompt = truncate(services, prompt, body.truncate_prompt_tokens, params.max_tokens)
    check_length(services, "messages", text, prompt)
    structure = tools.structure
    if structure is not None:
        if style is not None and (stage := first_stage(style, text)) != "after":
            mark = mark_of(services.llm.get_tokenizer())
            structure = whole(structure, after_reasoning(structure.form, style, stage, mark))
        params = dataclasses.replace(params, structured_outputs=structure.params)

    def text_parser() -> TextParser | None:
        if tools.parser is None and style is None:
            return None
        reasoning = None if style is None else ReasoningParser(style, text)
        return TextParser(reasoning, None if tools.parser is None else tools.parser())

    salt = context.cache_salt(body.cache_salt)
    generation = Generation(services, context, [prompt], params, body.priority or 0, salt)
    generation.names = {} if structure is None else structure.names
    return PreparedChat(model, prompt, generation, text_parser)


def _params(services: Services, body: ChatRequest, tools: ToolUse, style: ReasoningStyle | None) -> SamplingParams:
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        limit = f"is the old name of max_completion_tokens, which is {body.max_completion_tokens}; give one"
        raise refuse("max_tokens", body.max_tokens, limit)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if asked is None:  # the model's max_new_tokens, where its generation_config has one; else as many as fit
        configured = services.llm.builder.default_params().max_tokens
        asked = None if configured == SamplingParams().max_tokens else configured
    own: dict[str, Any] = {"max_tokens": asked}
    if body.top_logprobs is not None and not body.logprobs:
        raise refuse("top_logprobs", body.top_logprobs, "needs logprobs=true")
    if body.logprobs:
        own["logprobs"] = body.top_logprobs or 0
    special = tools.special_tokens
    if style is not None:
        tokenizer = services.llm.get_tokenizer()
        special |= special_token(tokenizer, style.start) is not None or special_token(tokenizer, style.end) is not None
    if special:
        own["skip_special_tokens"] = False
    return sampling_params(services, body, **own)

"""A chat's tools: how its calls are read, and the form that they must have."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxllm.serving.errors import refuse
from jaxllm.serving.forms import Form, json_text, mark_of, params_of, special_token
from jaxllm.serving.protocol.chat import ChatRequest
from jaxllm.serving.protocol.tools import Function
from jaxllm.serving.services import Services
from jaxllm.serving.structure import Structure, whole
from jaxllm.serving.tools import ToolParser, tool_parser
from jaxllm.serving.tools.base import CallableTool
from jaxllm.serving.tools.json_calls import JsonCallsParser, NamedCallParser, json_calls

ANY_OBJECT: dict[str, Any] = {"type": "object"}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclasses.dataclass(frozen=True)
class ToolUse:
    """What tools make of an answer.

    Attributes:
      parser: makes the parser of one answer's calls; None: none are looked for.
      structure: the form of the whole answer, reasoning aside; None: any.
      special_tokens: the calls are written with special tokens, which must not be skipped.
      named: a certain function was asked for.
    """

    parser: Callable[[], ToolParser] | None = None
    structure: Structure | None = None
    special_tokens: bool = False
    named: bool = False


def tool_use(services: Services, body: ChatRequest, structure: Structure | None, parameters: str) -> ToolUse:
    """Raises ApiError.

    Args:
      structure: what the answer must look like where it is no call.
      parameters: what the client calls a tool's parameters; {} stands for its number.
    """
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none"):
            raise refuse("tool_choice", choice, "needs tools")
        return ToolUse(structure=structure)
    if choice == "none":
        return ToolUse(structure=structure)
    name = services.config.tool_call_parser
    parser = None if name is None else tool_parser(name)
    functions = [tool.function for tool in body.tools]
    many = body.parallel_tool_calls is not False
    if choice in (None, "auto"):
        return _left_to_the_model(services, functions, parser, structure, parameters, many)
    if structure is not None and structure.field.startswith("structured_outputs"):
        raise refuse("structured_outputs", "…", f"excludes tool_choice={choice!r}, whose calls have their own form")
    wanted = choice.removeprefix("function:") if choice.startswith("function:") else None
    if wanted is not None and wanted not in [function.name for function in functions]:
        raise refuse(
            "tool_choice", wanted, f"is none of the tools {', '.join(function.name for function in functions)}"
        )
    tools = [
        CallableTool(function.name, json_text(_schema(function, parameters.format(at)), parameters.format(at)))
        for at, function in enumerate(functions)
        if wanted in (None, function.name)
    ]
    # Two of one name: the first is meant.
    tools = tools[:1] if wanted is not None else tools
    mark = mark_of(services.llm.get_tokenizer())
    form = None if parser is None else parser.calls(tools, mark, many and wanted is None)
    if form is not None:
        return _use(services, parser, form, wanted is not None)
    if wanted is not None:
        return ToolUse(lambda: NamedCallParser(wanted), _of_tools(tools[0].arguments), named=True)
    return ToolUse(JsonCallsParser, _of_tools(json_calls(tools, many)))


def _left_to_the_model(
    services: Services,
    functions: list[Function],
    parser: type[ToolParser] | None,
    structure: Structure | None,
    parameters: str,
    many: bool,
) -> ToolUse:
    """tool_choice auto."""
    if parser is None:
        limit = "start the server with --tool-call-parser to let the model call tools by itself"
        raise refuse("tools", f"{len(functions)} tools", limit)
    name, strict = services.config.tool_call_parser, [at for at, function in enumerate(functions) if function.strict]
    if structure is None and not strict:
        return _use(services, parser, None, False)
    tools = []
    for at, function in enumerate(functions):
        field = parameters.format(at)
        schema = _schema(function, field) if function.strict else ANY_OBJECT
        tools.append(CallableTool(function.name, json_text(schema, field)))
    mark = mark_of(services.llm.get_tokenizer())
    if structure is None:
        form = parser.text_and_calls(tools, mark, many)
        if form is None:
            field = parameters.format(strict[0]).removesuffix("parameters") + "strict"
            raise refuse(field, True, f"is not supported with tool_choice='auto' and --tool-call-parser {name}")
        return _use(services, parser, form, False)
    form = parser.calls_or(structure.form, tools, mark, many)
    if form is None:
        limit = f"cannot be told from the calls of --tool-call-parser {name}: set tool_choice, or leave out the tools"
        raise refuse(structure.field, "…", limit)
    return dataclasses.replace(_use(services, parser, form, False), structure=whole(structure, form))


def _use(services: Services, parser: type[ToolParser] | None, form: Form | None, named: bool) -> ToolUse:
    assert parser is not None
    tokenizer = services.llm.get_tokenizer()
    special = parser.special_tokens or any(special_token(tokenizer, marker) for marker in parser.markers)
    return ToolUse(parser, None if form is None else _of_tools(form), special, named)


def _of_tools(form: Form) -> Structure:
    return Structure(params_of(form), "tools")


def _schema(function: Function, field: str) -> dict[str, Any]:
    """The schema of a function's arguments. Raises ApiError if they are no object."""
    schema = function.parameters
    if schema is None:
        return NO_ARGUMENTS
    if schema.get("type", "object") != "object":
        raise refuse(field, schema, "must be the JSON schema of an object")
    return {"type": "object", **schema}

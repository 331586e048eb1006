"""Command-line flags made from dataclasses, so that each option is written once, where it is checked."""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import typer

from jaxllm.cli.flags import flags_of
from jaxllm.config import EngineConfig
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.serving.config import ServerConfig

Command = Callable[..., Any]

# Of SamplingParams, what makes sense for text on a terminal.
SAMPLING_FLAGS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
    "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "bad_words", "skip_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip


def engine_options(*, without: Collection[str] = ("model",)) -> Callable[[Command], Command]:
    """Gives a command a flag for each field of EngineConfig; what the user sets comes in as its argument `engine`.

    `engine` is a dict of the fields that were set, so that the defaults stay EngineConfig's (and those of the command's
    own choosing). `without` names fields that the command has its own way for.
    """
    fields = [field for field in dataclasses.fields(EngineConfig) if field.name not in without]
    helps = {field.name: field.metadata["help"] for field in fields}
    return _with_fields("engine", EngineConfig, fields, helps, "Engine")


def sampling_options() -> Callable[[Command], Command]:
    """The same for SamplingParams, as the argument `sampling`; its docstring tells what each flag does."""
    fields = [field for field in dataclasses.fields(SamplingParams) if field.name in SAMPLING_FLAGS]
    helps = dict(re.findall(r"^ +(\w+): (.*)$", SamplingParams.__doc__ or "", re.MULTILINE))
    return _with_fields("sampling", SamplingParams, fields, helps, "Sampling")


def server_options(*, only: Collection[str] | None = None) -> Callable[[Command], Command]:
    """The same for ServerConfig, as the argument `server`; `only` names the fields that the command has a use for."""
    fields = [field for field in dataclasses.fields(ServerConfig) if only is None or field.name in only]
    helps = {field.name: field.metadata["help"] for field in fields}
    return _with_fields("server", ServerConfig, fields, helps, "Server")


def _with_fields(
    into: str, owner: type, fields: Iterable[dataclasses.Field], helps: Mapping[str, str], panel: str
) -> Callable[[Command], Command]:
    hints = typing.get_type_hints(owner)
    kinds = {field.name: _flag_type(hints[field.name]) for field in fields}
    tuples = {name for name in kinds if typing.get_origin(_without_none(hints[name])) is tuple}
    added = [_parameter(field, kinds[field.name], helps.get(field.name, ""), panel) for field in fields]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> Any:
            chosen = {name: values.pop(name) for name in kinds}
            given = {
                name: _integers(name, value) if name in tuples else value
                for name, value in chosen.items()
                if value is not None and value != []
            }
            return command(**values, **{into: given})

        own = inspect.signature(command, eval_str=True)
        parameters = [parameter for parameter in own.parameters.values() if parameter.name != into] + added
        # functools.wraps made `run` look like `command`: what typer must see is the new list.
        del run.__wrapped__
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _without_none(kind: Any) -> Any:
    """`int | None` → `int`; of several types the list, or else the first."""
    if not isinstance(kind, types.UnionType) and typing.get_origin(kind) is not typing.Union:
        return kind
    inner = [option for option in typing.get_args(kind) if option is not type(None)]
    lists = [option for option in inner if typing.get_origin(option) is Sequence]
    return (lists or inner)[0]


def _flag_type(kind: Any) -> Any:
    """What typer parses: sequences are flags given again and again, tuples of integers text such as "1,8,64"."""
    kind = _without_none(kind)
    origin = typing.get_origin(kind)
    if origin is tuple:
        return str
    if origin is not None and origin is not Literal:
        return types.GenericAlias(list, typing.get_args(kind))
    return kind


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of integers such as 1,8,64", param_hint=name) from None


def _parameter(field: dataclasses.Field, kind: Any, help: str, panel: str) -> inspect.Parameter:
    """The flag of one field, under all its names. Its default is None, "not set"; the help tells the dataclass's."""
    flags = flags_of(field.name)
    declarations = [f"{flag}/--no-{flag[2:]}" for flag in flags] if kind is bool else flags
    shown = "" if field.default in (None, (), dataclasses.MISSING) else f" (default: {field.default})"
    option = typer.Option(*declarations, help=help + shown, rich_help_panel=panel, show_default=False)
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

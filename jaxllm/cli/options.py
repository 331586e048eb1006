"""Command-line flags made from dataclasses, so that each option is written once, where it is checked."""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

import typer

from jaxllm.config import EngineConfig

PANEL = "Engine"


def _flag_type(kind: Any) -> Any:
    """The type that typer parses: tuples of integers come as text, "1,8,64"."""
    inner = [option for option in typing.get_args(kind) if option is not type(None)]
    if isinstance(kind, types.UnionType) and len(inner) == 1:
        return _flag_type(inner[0]) | None if not _is_literal(inner[0]) else kind
    return str if typing.get_origin(kind) is tuple else kind


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is Literal


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of integers such as 1,8,64", param_hint=name) from None


def engine_options(*, without: Collection[str] = ("model",)) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command a flag for each field of EngineConfig; what the user sets comes in as its argument `engine`.

    `engine` is a dict of the fields that were set, so that the defaults stay EngineConfig's (and those of the command's
    own choosing). `without` names fields that the command has its own way for.
    """
    fields = [field for field in dataclasses.fields(EngineConfig) if field.name not in without]
    kinds = typing.get_type_hints(EngineConfig)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(**values: Any) -> Any:
            engine = {}
            for field in fields:
                value = values.pop(field.name)
                if value is not None:
                    is_tuple = _flag_type(kinds[field.name]) != kinds[field.name]
                    engine[field.name] = _integers(field.name, value) if is_tuple else value
            return command(**values, engine=engine)

        own = inspect.signature(command, eval_str=True)
        parameters = [parameter for parameter in own.parameters.values() if parameter.name != "engine"]
        for field in fields:
            parameters.append(_parameter(field, kinds[field.name]))
        # functools.wraps made `run` look like `command`: what typer must see is the new list.
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del run.__wrapped__  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(field: dataclasses.Field, kind: Any) -> inspect.Parameter:
    """The flag of one field. Its default is None, "not set"; the help tells EngineConfig's."""
    parsed = _flag_type(kind)
    flag = "--" + field.name.replace("_", "-")
    declaration = f"{flag}/--no-{flag[2:]}" if parsed is bool else flag
    default = "" if field.default is None else f" [default: {field.default}]"
    option = typer.Option(declaration, help=field.metadata["help"] + default, rich_help_panel=PANEL, show_default=False)
    optional = parsed if type(None) in typing.get_args(parsed) else parsed | None
    annotation = Annotated[optional, option]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

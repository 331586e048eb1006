"""Chat templates: Jinja as Hugging Face Transformers renders it, in a sandbox.

Options, globals and filters are those of `transformers/utils/chat_template_utils.py`: trim_blocks, lstrip_blocks,
loopcontrols, the `generation` tag, tojson, raise_exception, strftime_now.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from jaxllm.errors import InvalidRequestError

MAX_RENDERED_CHARACTERS = 1 << 26


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it only renders it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, without attributes whose names Python gives a meaning."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"namespace attribute {name!r}")
        super().__setitem__(name, value)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)  # a function, so that templates cannot reach the class


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML characters, which models have not seen
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(value: Any) -> Any:
    """The value rebuilt of JSON types, so that a template meets no object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if type(value) is dict or isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    # an enum or a numpy float is a str or float with more methods: only the value itself goes on
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return f"<{type(value).__name__}>"


def choose_template(templates: Mapping[str, str], with_tools: bool) -> str:
    """The template for a conversation: "tool_use" where there are tools and such a template, else "default".

    Raises:
      InvalidRequestError: the model has none.
    """
    for name in ("tool_use", "default") if with_tools else ("default",):
        if name in templates:
            return templates[name]
    if templates:
        raise InvalidRequestError("chat_template", sorted(templates), 'none of the model\'s templates is "default"')
    raise InvalidRequestError("messages", "…", "the model has no chat template; send a prompt instead")


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str):
        """Compiles Jinja source.

        Raises:
          InvalidRequestError: it is no valid Jinja.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        environment.globals.update(namespace=_Namespace, dict=_make_dict)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidRequestError("chat_template", source, f"is no valid Jinja template: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation; arguments as in `Tokenizer.apply_chat_template`.

        Raises:
          InvalidRequestError: the messages are no list of dicts, or the template refuses or fails on them.
        """
        if isinstance(messages, (str, bytes, Mapping)) or not all(isinstance(item, Mapping) for item in messages):
            raise InvalidRequestError("messages", messages, "must be a list of dicts with role and content")
        if not messages:
            raise InvalidRequestError("messages", messages, "must not be empty")
        context = {
            **(variables or {}),
            "messages": messages,
            "tools": list(tools) if tools else None,
            "documents": None,
        }
        context["add_generation_prompt"] = add_generation_prompt
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(**_plain(context)):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_RENDERED_CHARACTERS:
                    raise jinja2.TemplateError(f"the result exceeds {MAX_RENDERED_CHARACTERS} characters")
        except Exception as error:  # a template can fail in any way on messages of an unforeseen form
            reason = str(error) or type(error).__name__
            raise InvalidRequestError("messages", list(messages), f"refused by the chat template: {reason}") from error
        return "".join(pieces)

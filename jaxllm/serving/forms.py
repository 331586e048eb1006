"""What an answer must look like, in the words of structural tags: see `jaxllm.structured.structural_tag`."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.text.tokenizer import Tokenizer

Form = dict[str, Any]
Mark = Callable[[str], Form]  # a marker of the model's: as its special token, if it has one for it

ANY_TEXT: Form = {"type": "any_text"}


def const(text: str) -> Form:
    """Just this text."""
    return {"type": "const_string", "value": text}


def regex(pattern: str) -> Form:
    """Text that matches."""
    return {"type": "regex", "pattern": pattern}


def json_text(schema: Any, field: str, **options: Any) -> Form:
    """JSON under a schema that the client calls `field`."""
    return {"type": "json_schema", "json_schema": schema, "field": field, **options}


def sequence(*elements: Form) -> Form:
    """One after the other."""
    return elements[0] if len(elements) == 1 else {"type": "sequence", "elements": list(elements)}


def either(elements: Sequence[Form]) -> Form:
    """One of them."""
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": list(elements)}


def optional(content: Form) -> Form:
    """That or nothing."""
    return {"type": "optional", "content": content}


def separated(content: Form, separator: str, many: bool) -> Form:
    """That, once or (many) several times."""
    if not many:
        return content
    return sequence(content, {"type": "star", "content": sequence(const(separator), content)})


def tag(begin: Form, content: Form, end: Form | None = None) -> Form:
    """Content between marks, which are texts or tokens."""
    return {"type": "tag", "begin": _mark(begin), "content": content, "end": _mark(end or const(""))}


def triggered(trigger: Form, tags: Sequence[Form], *, stop_after_first: bool) -> Form:
    """Free text in which one of the tags stands wherever their common trigger comes."""
    form = {"type": "triggered_tags", "triggers": [_mark(trigger)], "tags": list(tags)}
    return {**form, "stop_after_first": stop_after_first}


def _mark(form: Form) -> Any:
    return form["value"] if form["type"] == "const_string" else form


def special_token(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of the special token of that name; None where text of that name is text."""
    token = tokenizer.token_to_id(text)
    return token if token in tokenizer.special_ids else None


def mark_of(tokenizer: Tokenizer) -> Mark:
    """How this model writes its markers."""

    def mark(text: str) -> Form:
        token = special_token(tokenizer, text)
        return const(text) if token is None else {"type": "token", "token": token}

    return mark


def form_of(params: StructuredOutputsParams, field: str) -> Form:
    """The same as a part of a larger form; errors call it `field`."""
    options = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
    given = {name: getattr(params, name) for name in options if getattr(params, name)}
    if params.json_object is not None:
        return json_text({"type": "object"}, field, **given)
    if params.json is not None:
        return json_text(json.loads(params.json) if isinstance(params.json, str) else params.json, field, **given)
    if params.regex is not None:
        return {**regex(params.regex), "field": field}
    if params.choice is not None:
        return either([const(text) for text in params.choice])
    if params.grammar is not None:
        return {"type": "grammar", "grammar": params.grammar, "field": field}
    assert params.structural_tag is not None
    return {"type": "structural_tag", "structural_tag": json.loads(params.structural_tag), "field": field}


def params_of(form: Form) -> StructuredOutputsParams:
    """For the engine."""
    text = json.dumps({"type": "structural_tag", "format": form}, ensure_ascii=False)
    return StructuredOutputsParams(structural_tag=text)

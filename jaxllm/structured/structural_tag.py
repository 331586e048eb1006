"""Structural tags to grammars: outputs of which some parts are free and some have a form.

A structural tag is {"type": "structural_tag", "format": FORMAT}, as xgrammar and vLLM have it, or the older
{"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}. A FORMAT is an object whose `type` is one of

- const_string (`value`), json_schema (`json_schema`), regex (`pattern`), grammar (`grammar`: Lark or GBNF), any_text
- token (`token`): one special token, by its id
- sequence, or (`elements`); optional, star, plus (`content`)
- tag (`begin`, `content`, `end`)
- triggered_tags (`triggers`, `tags`, `at_least_one`, `stop_after_first`): free text in which a tag stands wherever one
  of the triggers comes, with which the tag begins
- tags_with_separator (`tags`, `separator`, `at_least_one`, `stop_after_first`)

A trigger, a tag's begin and its end may be a token instead of a string. Text that is free goes on to the end of the
output, or of its tag. Beside `json_schema` may stand the options of `StructuredOutputsParams` for JSON, by their names.
A structural tag may stand as a format itself (`structural_tag`). That, and json_schema, regex and grammar, may have a
`field`, by which errors call it.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from jaxllm.errors import InvalidRequestError
from jaxllm.structured.json_schema import PreparedSchema, SchemaError, prepare

FIELD = "structured_outputs.structural_tag"

JSON_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")

# The keys of each type: those that it needs, and those that it may have.
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "const_string": ({"value"}, set()),
    "json_schema": ({"json_schema"}, {*JSON_OPTIONS, "field"}),
    "structural_tag": ({"structural_tag"}, {"field"}),
    "regex": ({"pattern"}, {"field"}),
    "grammar": ({"grammar"}, {"field"}),
    "any_text": (set(), set()),
    "token": ({"token"}, set()),
    "sequence": ({"elements"}, set()),
    "or": ({"elements"}, set()),
    "optional": ({"content"}, set()),
    "star": ({"content"}, set()),
    "plus": ({"content"}, set()),
    "tag": ({"begin", "content", "end"}, set()),
    "triggered_tags": ({"triggers", "tags"}, {"at_least_one", "stop_after_first"}),
    "tags_with_separator": ({"tags", "separator"}, {"at_least_one", "stop_after_first"}),
}
_ANY_TEXT = "/(?s:.*)/"


def structural_tag_lark(tag: Any) -> str:
    """The Lark grammar of a structural tag. Raises InvalidRequestError for what is none."""
    return _Writer().grammar(tag)


def named_parts(tag: Any) -> list[tuple[str, Any, str]]:
    """(field, value, its own grammar for llguidance) of those that have a `field`, to find which one is at fault."""
    writer = _Writer()
    writer.grammar(tag)
    return [(field, value, make(value)) for field, value, make in writer.named]


def json_options(prepared: PreparedSchema, options: dict[str, Any]) -> dict[str, Any]:
    """llguidance's options for a prepared schema."""
    made: dict[str, Any] = {"json_allowed_escapes": prepared.escapes}
    made["whitespace_flexible"] = not options.get("disable_any_whitespace", False)
    if options.get("whitespace_pattern") is not None:
        made["whitespace_pattern"] = options["whitespace_pattern"]
    return made


class _Writer:
    """Writes one grammar, rule by rule."""

    def __init__(self) -> None:
        self._rules: list[str] = []
        self.named: list[tuple[str, Any, Callable[[Any], str]]] = []

    def grammar(self, tag: Any) -> str:
        """All of it."""
        self._whole = tag
        start = self._write(*self._form_of(tag), last=True)
        return "\n".join([f"start: {start}", *self._rules]) + "\n"

    def _form_of(self, tag: Any) -> tuple[Any, str]:
        """The format of either kind of structural tag, and its path."""
        if isinstance(tag, dict) and tag.get("type") == "structural_tag":
            self._need(set(tag) == {"type", "format"}, "needs 'format' beside its type, and nothing else")
            return tag["format"], "format"
        both = isinstance(tag, dict) and set(tag) - {"type"} == {"structures", "triggers"}
        self._need(both, "needs 'type' and 'format', or 'structures' and 'triggers'")
        structures = tag["structures"]
        self._need(isinstance(structures, list) and bool(structures), "needs at least one structure")
        tags = []
        for structure in structures:
            known = isinstance(structure, dict) and set(structure) == {"begin", "schema", "end"}
            self._need(known, "a structure has 'begin', 'schema' and 'end'")
            content = {"type": "json_schema", "json_schema": structure["schema"]}
            tags.append({"type": "tag", "begin": structure["begin"], "content": content, "end": structure["end"]})
        return {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}, "structures"

    def _need(self, holds: bool, limit: str, path: str = "") -> None:
        if not holds:
            raise InvalidRequestError(FIELD, self._whole, f"{path}: {limit}" if path else limit)

    def _name(self, form: Any, value: Any, make: Callable[[Any], str]) -> None:
        """Keeps a part that has a name of its own; `make` makes a grammar of its value alone."""
        if form.get("field"):
            self.named.append((form["field"], value, make))

    def _rule(self, body: str, *, terminal: bool = False, options: str = "") -> str:
        name = f"{'T' if terminal else 'r'}{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def _write(self, form: Any, path: str, last: bool) -> str:
        """An expression for a format; adds the rules that it needs. last: the output, or its tag, ends with it."""
        self._need(isinstance(form, dict), "must be an object", path)
        kind = form.get("type")
        self._need(isinstance(kind, str) and kind in _KEYS, f"type {kind!r} is none of {', '.join(_KEYS)}", path)
        needed, possible = _KEYS[kind]
        given = set(form) - {"type"}
        self._need(needed <= given, f"{kind} needs {', '.join(sorted(needed))}", path)
        self._need(
            given <= needed | possible, f"{kind}: unknown key {min(given - needed - possible, default='')!r}", path
        )
        return getattr(self, f"_write_{kind}")(form, path, last)

    # The types

    def _write_const_string(self, form: Any, path: str, last: bool) -> str:
        self._need(isinstance(form["value"], str), "value must be a string", path)
        return _literal(form["value"])

    def _write_token(self, form: Any, path: str, last: bool) -> str:
        token = form["token"]
        self._need(type(token) is int and token >= 0, "token must be a token id", path)
        return f"<[{token}]>"

    def _write_regex(self, form: Any, path: str, last: bool) -> str:
        import llguidance

        pattern = form["pattern"]
        self._need(isinstance(pattern, str) and bool(pattern), "pattern must be a non-empty string", path)
        self._name(form, pattern, llguidance.LLMatcher.grammar_from_regex)
        escaped = {"/": r"\/", "\n": r"\n"}
        return f"/{re.sub(r'\\.|/|\n', lambda m: escaped.get(m[0], m[0]), pattern, flags=re.DOTALL)}/"

    def _write_grammar(self, form: Any, path: str, last: bool) -> str:
        import llguidance

        self._need(isinstance(form["grammar"], str) and bool(form["grammar"]), "grammar must be a string", path)
        try:
            own = llguidance.grammar_from("grammar", form["grammar"])
        except ValueError as error:
            field = form.get("field")
            self._need(bool(field), str(error), path)
            raise InvalidRequestError(field, form["grammar"], str(error)) from None
        self._name(form, form["grammar"], lambda _: own)
        return self._rule(f"%lark {{\n{own}\n}}")

    def _write_json_schema(self, form: Any, path: str, last: bool) -> str:
        schema, field = form["json_schema"], form.get("field")
        options = {name: form[name] for name in JSON_OPTIONS if name in form}
        try:
            prepared = prepare(schema, close_objects=options.get("disable_additional_properties", False))
        except SchemaError as error:
            raise InvalidRequestError(field or FIELD, schema, str(error) if field else f"{path}: {error}") from None
        own = {**prepared.schema, "x-guidance": json_options(prepared, options)}
        self._name(form, schema, lambda _: _json_grammar(own))
        return self._rule(f"%json {json.dumps(own)}")

    def _write_structural_tag(self, form: Any, path: str, last: bool) -> str:
        tag = form["structural_tag"]
        if not form.get("field"):
            inner, below = self._form_of(tag)
            return self._write(inner, f"{path}.{below}", last)
        whole, self._whole = self._whole, tag  # errors show it alone, and know no path outside
        written = self._write(*self._form_of(tag), last)
        self._whole = whole
        self._name(form, tag, _tag_grammar)
        return written

    def _write_any_text(self, form: Any, path: str, last: bool) -> str:
        self._need(last, "any_text goes on to the end: nothing may follow it but its tag's end", path)
        return self._rule(_ANY_TEXT, terminal=True)

    def _write_sequence(self, form: Any, path: str, last: bool) -> str:
        elements = self._list(form["elements"], path)
        ends = [last and index == len(elements) - 1 for index in range(len(elements))]
        parts = [self._write(e, f"{path}.elements[{i}]", ends[i]) for i, e in enumerate(elements)]
        return f"({' '.join(parts)})"

    def _write_or(self, form: Any, path: str, last: bool) -> str:
        elements = self._list(form["elements"], path)
        parts = [self._write(element, f"{path}.elements[{index}]", last) for index, element in enumerate(elements)]
        if all(element["type"] == "const_string" for element in elements):
            return self._rule(" | ".join(parts), terminal=True)  # one terminal, so that one may begin with another
        return f"({' | '.join(parts)})"

    def _write_optional(self, form: Any, path: str, last: bool) -> str:
        return f"({self._write(form['content'], f'{path}.content', last)})?"

    def _write_star(self, form: Any, path: str, last: bool) -> str:
        return f"({self._write(form['content'], f'{path}.content', False)})*"

    def _write_plus(self, form: Any, path: str, last: bool) -> str:
        return f"({self._write(form['content'], f'{path}.content', False)})+"

    def _write_tag(self, form: Any, path: str, last: bool) -> str:
        begin, end = self._mark(form["begin"], f"{path}.begin"), self._mark(form["end"], f"{path}.end")
        return (
            f"({begin} {self._content(form, path, last)})" if not end else f"({begin} {self._ended(form, path, end)})"
        )

    def _content(self, form: Any, path: str, last: bool) -> str:
        return self._write(form["content"], f"{path}.content", last)

    def _ended(self, form: Any, path: str, end: str) -> str:
        """A tag's content and its end."""
        content = form["content"]
        if isinstance(content, dict) and content.get("type") == "any_text" and isinstance(form["end"], str):
            return self._rule(f"{self._rule(_ANY_TEXT, terminal=True)} {end}", options="[lazy]")
        return f"{self._write(content, f'{path}.content', isinstance(form['end'], dict))} {end}"

    def _write_triggered_tags(self, form: Any, path: str, last: bool) -> str:
        triggers, tags = self._list(form["triggers"], path), self._tags(form, path)
        marks = [self._mark(trigger, f"{path}.triggers[{index}]") for index, trigger in enumerate(triggers)]
        self._need(all(marks), "a trigger must not be empty", path)
        texts = [trigger for trigger in triggers if isinstance(trigger, str)]
        free = _ANY_TEXT
        if texts:
            free += f" & ~/(?s:.*)(?:{'|'.join(map(_escaped, texts))})(?s:.*)/"
        plain = self._rule(free, terminal=True)
        found: list[list[str]] = [[] for _ in triggers]
        for index, tag in enumerate(tags):
            at, begin = f"{path}.tags[{index}]", tag["begin"]
            place = next((i for i, trigger in enumerate(triggers) if _begins(begin, trigger)), None)
            self._need(place is not None, f"no trigger begins {begin!r}", at)
            assert place is not None
            lead = _literal(begin[len(triggers[place]) :]) if isinstance(begin, str) else ""
            end = self._mark(tag["end"], f"{at}.end")
            rest = self._ended(tag, at, end) if end else self._content(tag, at, last)
            found[place].append(f"{lead} {rest}")
        branches = []
        for trigger, mark, rests in zip(triggers, marks, found, strict=True):
            if rests:
                head = f"{plain} {mark}"
                head = self._rule(head, options="[lazy]") if isinstance(trigger, str) else head
                branches.append(f"{head} ({' | '.join(rests)})")
        one = f"({' | '.join(branches)})"
        at_least_one, stop = self._flags(form, path)
        self._need(last or (stop and at_least_one), "text goes on after the tags to the end: nothing may follow", path)
        if stop:
            return one if at_least_one else f"({one} | {plain})"
        return f"({one}{'+' if at_least_one else '*'} {plain})"

    def _write_tags_with_separator(self, form: Any, path: str, last: bool) -> str:
        separator = self._mark(form["separator"], f"{path}.separator")
        tags = [
            self._write_tag(tag, f"{path}.tags[{index}]", False) for index, tag in enumerate(self._tags(form, path))
        ]
        one = self._rule(" | ".join(tags))
        at_least_one, stop = self._flags(form, path)
        many = one if stop else f"{one} ({separator} {one})*"
        return f"({many})" if at_least_one else f"({many})?"

    # Parts of them

    def _list(self, value: Any, path: str) -> list[Any]:
        self._need(isinstance(value, list) and bool(value), "must be lists that are not empty", path)
        return value

    def _tags(self, form: Any, path: str) -> list[Any]:
        tags = self._list(form["tags"], path)
        for index, tag in enumerate(tags):
            known = isinstance(tag, dict) and set(tag) - {"type"} == {"begin", "content", "end"}
            self._need(known and tag.get("type", "tag") == "tag", "must be a tag", f"{path}.tags[{index}]")
            self._mark(tag["begin"], f"{path}.tags[{index}].begin")
        return tags

    def _flags(self, form: Any, path: str) -> tuple[bool, bool]:
        flags = [form.get(name, False) for name in ("at_least_one", "stop_after_first")]
        self._need(all(isinstance(flag, bool) for flag in flags), "at_least_one, stop_after_first: true or false", path)
        return flags[0], flags[1]

    def _mark(self, value: Any, path: str) -> str:
        """A string or a token; empty for the empty string."""
        if isinstance(value, dict):
            self._need(value.get("type") == "token", "must be a string or a token", path)
            return self._write(value, path, False)
        self._need(isinstance(value, str), "must be a string or a token", path)
        return _literal(value) if value else ""


def _begins(begin: Any, trigger: Any) -> bool:
    return begin.startswith(trigger) if isinstance(begin, str) and isinstance(trigger, str) else begin == trigger


def _json_grammar(schema: dict[str, Any]) -> str:
    import llguidance

    return llguidance.LLMatcher.grammar_from_json_schema(schema)


def _tag_grammar(tag: Any) -> str:
    import llguidance

    return llguidance.LLMatcher.grammar_from_lark(structural_tag_lark(tag))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """A regular expression of just this text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)

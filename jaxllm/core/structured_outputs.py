"""What a request may ask of its output's form, under vLLM's names."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from jaxllm.errors import InvalidRequestError

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
MAX_GRAMMAR_BYTES = 1 << 20
MAX_CHOICES = 10_000


@dataclasses.dataclass(kw_only=True)
class StructuredOutputsParams:
    """The form that an output must have: exactly one of json, regex, choice, grammar, json_object, structural_tag.

    Every token that cannot go on to a whole output of that form is forbidden. When nothing can follow, only an
    end-of-sequence token may be chosen. `max_tokens` may still cut the output short.

    Attributes:
      json: a JSON schema, as a dict or as text. Keywords that cannot be enforced are refused by name. Properties come
        in the schema's order; strings have no escapes that they do not need.
      regex: a regular expression (Rust's syntax: no look-around, no back-references; \\d and \\w match all of Unicode)
        that the whole output matches.
      choice: the output is one of these strings.
      grammar: a context-free grammar, in Lark's syntax (as llguidance reads it) or in GBNF.
      json_object: True: any JSON object.
      structural_tag: text of a JSON object that says which parts of the output are free and which have a form, as
        vLLM takes it: {"type": "structural_tag", "format": ...}, or {"structures": ..., "triggers": ...}. See
        `jaxllm.structured.structural_tag` for the formats.
      disable_fallback: accepted for vLLM's sake: there is one backend, and nothing to fall back to.
      disable_any_whitespace: JSON without any whitespace between its parts (json and json_object).
      disable_additional_properties: objects whose schema does not say have no additional properties (json).
      whitespace_pattern: a regular expression for the whitespace between the parts of JSON (json and json_object).
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequestError("structured_outputs", given, f"needs exactly one of {', '.join(KINDS)}")
        kind, value = given[0], getattr(self, given[0])
        for name in ("disable_fallback", "disable_any_whitespace", "disable_additional_properties"):
            self._need(isinstance(getattr(self, name), bool), name, "must be True or False")
        if kind == "json":
            self._need(isinstance(value, (str, dict)), kind, "must be a JSON schema, as a dict or as text")
        elif kind == "json_object":
            self._need(value is True, kind, "must be True or left out")
        elif kind == "choice":
            listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
            self._need(
                listed and len(value) > 0 and all(isinstance(text, str) and text for text in value),
                kind,
                "must be a list of at least one non-empty string",
            )
            self._need(len(value) <= MAX_CHOICES, kind, f"has {len(value)} strings, at most {MAX_CHOICES}")
        else:
            self._need(isinstance(value, str) and bool(value), kind, "must be a non-empty string")
        for name, kinds in (
            ("disable_any_whitespace", ("json", "json_object")),
            ("whitespace_pattern", ("json", "json_object")),
            ("disable_additional_properties", ("json",)),
        ):
            self._need(not getattr(self, name) or kind in kinds, name, f"goes with {' and '.join(kinds)} only")
        if self.whitespace_pattern is not None:
            self._need(isinstance(self.whitespace_pattern, str), "whitespace_pattern", "must be a string")
            self._need(not self.disable_any_whitespace, "whitespace_pattern", "excludes disable_any_whitespace")

    def _need(self, holds: bool, name: str, limit: str) -> None:
        if not holds:
            raise InvalidRequestError(f"structured_outputs.{name}", getattr(self, name), limit)

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    def checked(self) -> "StructuredOutputsParams":
        """A copy that messages can carry: the schema as text. Raises InvalidRequestError for what is no JSON, no
        Unicode, or too large."""
        copy = dataclasses.replace(self)
        kind, value = copy.kind, getattr(copy, copy.kind)
        try:
            if kind == "json":
                copy._need(
                    isinstance(value if isinstance(value, dict) else json.loads(value), (dict, bool)), kind, _SCHEMA
                )
                copy.json = value = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
            elif kind == "structural_tag":
                json.loads(value)
            elif kind == "choice":
                copy.choice = value = list(dict.fromkeys(value))
            texts = (
                value if kind == "choice" else [value, copy.whitespace_pattern or ""] if kind != "json_object" else []
            )
            size = sum(len(text.encode()) for text in texts)
        except UnicodeEncodeError:
            raise InvalidRequestError(f"structured_outputs.{kind}", value, "must be valid Unicode") from None
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, InvalidRequestError):
                raise
            reason, shown = str(error), value
            if isinstance(error, RecursionError):
                reason, shown = "it is nested too deeply", "..."  # to show it would raise too
            raise InvalidRequestError(f"structured_outputs.{kind}", shown, f"must be JSON: {reason}") from None
        copy._need(size <= MAX_GRAMMAR_BYTES, kind, f"takes {size} bytes, at most {MAX_GRAMMAR_BYTES}")
        return copy


_SCHEMA = "must be a JSON schema: an object, true or false"

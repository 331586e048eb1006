"""JSON schemas made ready for llguidance, where it reads them otherwise than the standard does.

What comes out allows no text that the schema forbids, or the schema is refused. An instance may have one spelling only:
properties in the schema's order, integers without a fraction, strings without escapes that they do not need. This is
also what keeps it sound: a name spelled with escapes would pass as another property.
"""

import copy
import dataclasses
import json
import re
from typing import Any

from jaxllm.structured.json_formats import format_pattern

# Where a schema holds others by name; what is under an unknown keyword may be referred to, and is looked through too.
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NO_SCHEMAS = ("const", "enum", "default", "examples", "required", "dependentRequired")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_OLD_DRAFTS = ("draft-03", "draft-04", "draft-06", "draft-07")
_LIBRARY_FORMATS = ("duration", "hostname", "ipv4", "uri", "uuid")  # llguidance's own, which are exact
_REFUSED_FORMATS = {"idn-email", "idn-hostname", "iri", "iri-reference", "json-pointer", "regex"}
_REFUSED_FORMATS |= {"relative-json-pointer", "uri-reference", "uri-template"}
# Keywords that llguidance lacks, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "propertyNames": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
}
_SHARED = "jaxllm."  # prefix of definitions that formats share

_NEEDED_ESCAPES = 'nrbtf\\"'
_ALL_ESCAPES = _NEEDED_ESCAPES + "u"  # control characters need it


class SchemaError(ValueError):
    """A schema that cannot be enforced; the message names the keyword."""


@dataclasses.dataclass
class PreparedSchema:
    """A schema for llguidance, and the escapes that its strings may hold (an option of its compiler)."""

    schema: dict[str, Any]
    escapes: str


def prepare(schema: Any, *, close_objects: bool = False) -> PreparedSchema:
    """A schema, parsed, as llguidance has to be given it.

    close_objects: objects whose schema lists properties and does not say may have no others.

    Raises SchemaError.
    """
    if isinstance(schema, bool):  # the library takes objects only
        schema = {} if schema else {"anyOf": [False]}
    if not isinstance(schema, dict):
        raise SchemaError("a JSON schema is an object, true or false")
    if "x-guidance" in schema:
        raise SchemaError('Unimplemented keys: ["x-guidance"]')
    schema = copy.deepcopy(schema)
    draft = schema.get("$schema")
    old = isinstance(draft, str) and any(name in draft for name in _OLD_DRAFTS)
    walk = _Walk(close_objects, refs_stand_alone=old, may_share="$id" not in json.dumps(schema))
    walk.schema(schema)
    if walk.shared:
        schema["$defs"] = {**schema.get("$defs", {}), **walk.shared}
    if walk.has_controls and walk.has_open_names:
        raise SchemaError("const and enum: control characters cannot be enforced beside properties of any name")
    return PreparedSchema(schema, _NEEDED_ESCAPES if walk.has_open_names else _ALL_ESCAPES)


class _Walk:
    """Rewrites a schema in place, and gathers what it met."""

    def __init__(self, close_objects: bool, refs_stand_alone: bool, may_share: bool):
        self._close_objects, self._refs_stand_alone, self._may_share = close_objects, refs_stand_alone, may_share
        self.shared: dict[str, Any] = {}
        self.has_controls = self.has_open_names = False

    def schema(self, schema: Any) -> None:
        """One schema, or whatever stands in its place."""
        if isinstance(schema, list):
            for item in schema:
                self.schema(item)
        if not isinstance(schema, dict):
            return
        for keyword, value in schema.items():
            if keyword in _BY_NAME and isinstance(value, dict):
                for inner in value.values():
                    self.schema(inner)
            elif keyword not in _NO_SCHEMAS:
                self.schema(value)
        if self._refs_stand_alone and isinstance(schema.get("$ref"), str):  # what stands beside them says nothing
            for keyword in schema.keys() - {"$ref", "$schema", "definitions", "$defs"}:
                del schema[keyword]
        self.has_controls |= any(_has_controls(schema.get(keyword)) for keyword in ("const", "enum"))
        for keyword in _COUNTS:
            count = schema.get(keyword)
            if isinstance(count, float) and count.is_integer():
                schema[keyword] = int(count)
        for keyword, values in _NEUTRAL.items():
            if any(type(schema.get(keyword)) is type(value) and schema[keyword] == value for value in values):
                del schema[keyword]
        self._objects(schema)
        self._strings(schema)

    def _objects(self, schema: dict[str, Any]) -> None:
        names = "properties" in schema or "patternProperties" in schema
        if self._close_objects and names:
            schema.setdefault("additionalProperties", False)
        self.has_open_names |= names and schema.get("additionalProperties") is not False
        least, required = schema.get("minProperties"), schema.get("required")
        if isinstance(least, int) and least >= 2 and least > (len(required) if isinstance(required, list) else 0):
            limit = "names that are not required may be repeated, and count once"
            raise SchemaError(f"minProperties={least} cannot be enforced: {limit}")
        patterns = schema.get("patternProperties")
        if isinstance(patterns, dict):
            schema["patternProperties"] = {translate(name): value for name, value in patterns.items()}

    def _strings(self, schema: dict[str, Any]) -> None:
        if isinstance(schema.get("pattern"), str):
            schema["pattern"] = translate(schema["pattern"])
        name = schema.get("format")
        if not isinstance(name, str) or name in _LIBRARY_FORMATS or name in _REFUSED_FORMATS:
            return
        del schema["format"]
        pattern = format_pattern(name)
        if pattern is None:  # none of the standard's: it says nothing of which strings are valid
            return
        if self._may_share and schema.get("type") == "string" and schema.keys() <= {"type", *_ANNOTATIONS}:
            self.shared[f"{_SHARED}{name}"] = {"type": "string", "pattern": pattern}
            schema.clear()
            schema["$ref"] = f"#/$defs/{_SHARED}{name}"
        elif "pattern" in schema:
            schema["allOf"] = [*schema.get("allOf", []), {"pattern": pattern}]
        else:
            schema["pattern"] = pattern


def _has_controls(value: Any) -> bool:
    """Whether a literal has a string that cannot be spelled without \\u."""
    if isinstance(value, str):
        return any((ord(c) < 32 and c not in "\n\r\b\t\f") or c == "\x7f" for c in value)
    if isinstance(value, dict):
        return any(map(_has_controls, value.values()))
    return isinstance(value, list) and any(map(_has_controls, value))


# --- regular expressions ---------------------------------------------------------------------------------------------

_SPACE = r"\t\n\x0B\f\r \u{A0}\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}\u{3000}\u{FEFF}"
_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": _SPACE}
_OPERATORS = ("&&", "~~", "--")  # of Rust's classes
_PARTS = re.compile(r"\\c[A-Za-z]|\\.|\[\^?\]|&&|~~|--|.", re.DOTALL)


def translate(pattern: str) -> str:
    """A regular expression as JSON schemas write it (ECMA 262) in Rust's syntax: the classes of characters are
    ECMA's. Raises SchemaError for what means something else there."""
    found: list[str] = []
    in_class = False
    for part in _PARTS.findall(pattern):
        if part in ("[]", "[^]") or (in_class and part in _OPERATORS):
            raise SchemaError(f"pattern {pattern!r}: {part!r} in a class of characters is not supported")
        if part[0] == "\\":
            found.append(_escape(part, in_class))
        elif in_class:
            found.append("\\[" if part == "[" else part)
            in_class = part != "]"
        else:
            found.append(r"[^\n\r\u{2028}\u{2029}]" if part == "." else part)
            in_class = part == "["
    return "".join(found)


def _escape(part: str, in_class: bool) -> str:
    kind = part[1:2]
    if kind.lower() in _CLASSES:
        inner = _CLASSES[kind.lower()]
        if kind.islower():
            return inner if in_class else f"[{inner}]"
        return f"[^{inner}]"
    if kind == "c" and len(part) == 3:
        return f"\\x{ord(part[2]) % 32:02x}"
    return "/" if kind == "/" else part

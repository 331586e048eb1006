"""What is changed in a schema before llguidance sees it: nothing gets through that the standard forbids."""

import json

import pytest

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.errors import InvalidRequestError
from jaxllm.structured.json_schema import SchemaError, prepare, translate
from tests.structured.test_schemas import accepts

FORMATS: list[tuple[str, list[str], list[str]]] = [
    ("date", ["2024-02-29", "2000-02-29", "1999-12-31"], ["2023-02-29", "1900-02-29", "2021-04-31", "2021-4-1"]),
    (
        "time",
        ["08:30:06Z", "23:59:60Z", "01:29:60.5+01:30", "15:59:60-08:00", "00:29:60-23:30", "08:30:06z"],
        ["23:58:60Z", "23:59:60+01:00", "24:00:00Z", "12:00:00", "08:30:06-24:00"],
    ),
    ("date-time", ["1998-12-31T15:59:60.123-08:00", "1963-06-19t08:30:06z"], ["1990-02-31T15:59:59Z", "2013-350"]),
    (
        "email",
        ["te~st@example.com", '"joe @ bloggs"@example.com', "a@[127.0.0.1]", "a@[IPv6:::1]"],
        [".a@b.c", "a..b@c.d", "a@b=c.d", "a@[127.0.0.300]", "a"],
    ),
    (
        "ipv6",
        ["::", "::1", "1::", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::", "1::8", "::ffff:1.2.3.4", "1:2:3:4:5:6:1.2.3.4"],
        ["1:2:3:4:5:6:7", "1:2:3:4:5:6:7:8::", "1::2::3", "12345::", "1:2:3:4:5:6:7:1.2.3.4", "::1.2.3.256", ":1"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("name,valid,invalid", FORMATS, ids=lambda value: value if isinstance(value, str) else "")
def test_formats_are_exact(compiler, name, valid, invalid):
    plain = {"type": "string", "format": name}
    beside = {"type": "string", "format": name, "minLength": 2, "pattern": "[^q]"}
    for schema in (plain, beside):
        for text in valid:
            assert accepts(compiler, json.dumps(text), json=schema), text
        for text in invalid:
            assert not accepts(compiler, json.dumps(text), json=schema), text
    untyped = {"properties": {"a": {"format": name}, "b": plain}}
    assert accepts(compiler, json.dumps({"a": 7, "b": valid[0]}), json=untyped)
    assert not accepts(compiler, json.dumps({"b": invalid[0]}), json=untyped)


@pytest.mark.parametrize(
    "pattern,valid,invalid",
    [
        (r"^\d\w\s$", ["1a ", "1_\ufeff", "1a\u2028"], ["\u0663a ", "1\u00e9 ", "1a\u200b"]),
        (r"^[\d\s]\S$", ["1a", "\ufeff1"], ["aa", "1\ufeff"]),
        (r"^.$", ["a", "\U0001f408"], ["\n", "\r", "\u2028"]),
        (r"^[[a]\/$", ["[/", "a/"], ["b/"]),
        (r"^\cJ$", ["\n"], ["J"]),
        (r"^[\]&~.-]\.$", ["].", "&.", "..", "-."], ["a.", "]a"]),
    ],
)
def test_patterns_have_ecmas_meaning(compiler, pattern, valid, invalid):
    for text, wanted in [(text, True) for text in valid] + [(text, False) for text in invalid]:
        spelled = json.dumps(text, ensure_ascii=False)
        assert accepts(compiler, spelled, json={"type": "string", "pattern": pattern}) is wanted, text


@pytest.mark.parametrize("pattern", ["[]a", "[^]", "[a&&b]", "[a--b]", "[a~~b]"])
def test_patterns_that_would_mean_something_else_are_refused(pattern):
    with pytest.raises(SchemaError, match="pattern"):
        translate(pattern)
    with pytest.raises(SchemaError, match="pattern"):
        prepare({"patternProperties": {pattern: {}}})


def test_a_name_has_one_spelling(compiler):
    """Spelled otherwise it would count as a property that the schema does not know."""
    schema = {"properties": {"a": {"type": "integer"}}, "patternProperties": {"^\u00e9+$": {"type": "integer"}}}
    assert accepts(compiler, '{"a": 1, "\u00e9": 2, "b": "x"}', json=schema)
    for text in ('{"\\u0061": "x"}', '{"\\u00e9": "x"}', '{"b": 1, "a": "x"}', '{"a": 1, "a": "x"}'):
        assert not accepts(compiler, text, json=schema), text


def test_control_characters(compiler):
    assert accepts(compiler, '"\\u0001"', json={"type": "string"})
    assert accepts(compiler, '"a\\u0000b"', json={"const": "a\x00b"})
    for text in ('"\\ud800"', '"\\u0061"'):  # half a character; an escape that is not needed
        assert not accepts(compiler, text, json={"type": "string"})
    with pytest.raises(InvalidRequestError, match="control characters"):
        schema = {"properties": {"a": {"const": "\x01"}}}
        compiler.compile(StructuredOutputsParams(json=schema).checked()).result(timeout=60)


@pytest.mark.parametrize(
    "schema,named",
    [
        ({"minProperties": 2}, "minProperties=2"),
        ({"items": {"minProperties": 3, "required": ["a", "b"]}}, "minProperties=3"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ({"format": "iri"}, "iri"),
    ],
)
def test_refused_by_name(compiler, schema, named):
    with pytest.raises(InvalidRequestError, match=named):
        compiler.compile(StructuredOutputsParams(json=schema).checked()).result(timeout=60)


def test_what_asks_for_nothing_is_left_out(compiler):
    """Formats that are none of the standard's are annotations."""
    schema = {
        "properties": {"path": {"type": "string", "format": "path"}, "n": {"type": "integer", "format": "int64"}},
        "uniqueItems": False,
        "propertyNames": {},
        "unevaluatedProperties": True,
        "dependentRequired": {},
    }
    assert accepts(compiler, '{"path": "a/b", "n": 1}', json=schema)
    assert not accepts(compiler, '{"path": 1}', json=schema)


def test_only_schemas_are_changed():
    """Not the names of properties, nor literals."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "properties": {"format": {"const": {"format": "date"}}, "pattern": {"enum": [{"pattern": "."}]}},
        "components": {"x": {"pattern": "."}},
        "minItems": 1.0,
        "maxItems": 2.5,
    }
    made = prepare(schema).schema
    assert made["properties"] == schema["properties"] and made["components"]["x"]["pattern"] != "."
    assert made["minItems"] == 1 and type(made["minItems"]) is int and made["maxItems"] == 2.5
    assert schema["components"]["x"]["pattern"] == "."


def test_beside_a_reference_old_drafts_say_nothing(compiler):
    schema = {
        "definitions": {"a": {"type": "string"}},
        "properties": {"b": {"$ref": "#/definitions/a", "maxLength": 1}},
    }
    assert not accepts(compiler, '{"b": "xy"}', json=schema)
    schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    assert accepts(compiler, '{"b": "xy"}', json=schema) and not accepts(compiler, '{"b": 1}', json=schema)

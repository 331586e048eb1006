"""JSON schemas, keyword by keyword: what is accepted is valid, or the keyword is refused by its name."""

import json

import pytest

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.errors import InvalidRequestError
from tests.engine.tiny import FIRST_BYTE


def accepts(compiler, text: str, **asked) -> bool:
    """Whether this text, byte by byte, is a whole output."""
    matcher = compiler.compile(StructuredOutputsParams(**asked).checked()).result(timeout=60).deep_copy()
    tokens = [FIRST_BYTE + byte for byte in text.encode()]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


ENFORCED: list[tuple[dict, list, list]] = [
    ({"type": "integer"}, [0, -7, 12345678901234567890], [1.5, "1", None, True, []]),
    ({"type": ["string", "null"]}, ["", "é", None], [0, False, {}]),
    ({"type": "number", "minimum": -1.5, "exclusiveMaximum": 10}, [-1.5, 0, 9.99], [-1.6, 10, "1"]),
    ({"type": "integer", "multipleOf": 7}, [0, 7, 70], [1, 6]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "éé", "abc"], ["a", "abcd", ""]),
    ({"type": "string", "pattern": "^a+b$"}, ["ab", "aab"], ["b", "abc", "xab"]),
    ({"type": "string", "pattern": "b"}, ["abc", "b"], ["a", ""]),
    ({"type": "string", "format": "uuid"}, ["2eb8aa08-aa98-11ea-b4aa-73b441d16380"], ["2eb8aa08", ""]),
    ({"type": "string", "format": "ipv4"}, ["10.0.0.255"], ["10.0.0.256", "a"]),
    ({"enum": ["a", 2, None, [1], {"k": "v"}]}, ["a", 2, None, [1], {"k": "v"}], ["b", 3, [2], {}]),
    ({"const": {"a": [True]}}, [{"a": [True]}], [{"a": [False]}, {}, True]),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}, [[True], [True, False]], [[], [1]]),
    ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, [[], [1]], [[2], [1, 1]]),
    (
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]},
        [{"a": 1}, {"a": 1, "b": None}, {"a": 1, "c": 2}],
        [{}, {"b": 1}, {"a": "1"}],
    ),
    ({"type": "object", "additionalProperties": {"type": "string"}}, [{}, {"a": "b"}], [{"a": 1}]),
    ({"type": "object", "patternProperties": {"^x": {"const": 1}}}, [{"x1": 1}, {"y": 2}], [{"x1": 2}]),
    ({"type": "object", "minProperties": 1, "maxProperties": 2}, [{"a": 1}, {"a": 1, "b": 2}], [{}]),
    ({"anyOf": [{"type": "integer"}, {"const": "x"}]}, [1, "x"], ["y", 1.5]),
    ({"allOf": [{"minimum": 2}, {"maximum": 4}], "type": "integer"}, [2, 4], [1, 5]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "x"], [None]),
    (
        {"$defs": {"list": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/list"}}]}}}
        | {"$ref": "#/$defs/list"},
        [None, [None, [[], None]]],
        [1, [1]],
    ),
]


@pytest.mark.parametrize("index", range(len(ENFORCED)))
def test_enforced(compiler, index):
    schema, valid, invalid = ENFORCED[index]
    for value in valid:
        assert accepts(compiler, json.dumps(value, ensure_ascii=False), json=schema), value
    for value in invalid:
        assert not accepts(compiler, json.dumps(value, ensure_ascii=False), json=schema), value


@pytest.mark.parametrize(
    "keyword",
    ["not", "if", "contains", "uniqueItems", "dependentRequired", "dependentSchemas", "propertyNames"]
    + ["unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "minContains"],
)
def test_refused_by_name(compiler, keyword):
    with pytest.raises(InvalidRequestError) as caught:
        compiler.compile(StructuredOutputsParams(json={"type": "array", keyword: {"type": "null"}}).checked()).result(
            timeout=60
        )
    assert caught.value.field == "structured_outputs.json" and f'"{keyword}"' in caught.value.limit


def test_one_of_that_may_overlap_is_refused(compiler):
    schema = {"oneOf": [{"type": "integer"}, {"minimum": 2}]}
    with pytest.raises(InvalidRequestError, match="oneOf"):
        compiler.compile(StructuredOutputsParams(json=schema).checked()).result(timeout=60)


def test_whitespace(compiler):
    schema = {"type": "array", "items": {"type": "null"}}
    assert accepts(compiler, "[null,\n\t null ]", json=schema)
    assert accepts(compiler, "[null,null]", json=schema, disable_any_whitespace=True)
    assert not accepts(compiler, "[null, null]", json=schema, disable_any_whitespace=True)
    assert accepts(compiler, "[ null, null]", json=schema, whitespace_pattern=" ?")
    assert not accepts(compiler, "[  null]", json=schema, whitespace_pattern=" ?")


def test_additional_properties(compiler):
    inner = {"type": "object", "properties": {"a": {}}}
    schema = {"type": "object", "properties": {"in": inner}, "additionalProperties": True}
    assert accepts(compiler, '{"in":{"a":1,"z":1},"y":1}', json=schema)
    assert not accepts(compiler, '{"in":{"a":1,"z":1}}', json=schema, disable_additional_properties=True)
    assert accepts(compiler, '{"in":{"a":1},"y":1}', json=schema, disable_additional_properties=True)


def test_any_object_and_any_value(compiler):
    assert accepts(compiler, '{"a": [1, {"b": null}]}', json_object=True) and not accepts(
        compiler, "[]", json_object=True
    )
    assert accepts(compiler, "[1]", json="true") and accepts(compiler, '"x"', json={})

"""What is refused at once, by name."""

import json

import pytest

from jaxllm import BeamSearchParams, SamplingParams, StructuredOutputsParams
from jaxllm.core.structured_outputs import MAX_GRAMMAR_BYTES
from jaxllm.errors import InvalidRequestError


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "exactly one"),
        ({"json": {}, "json_object": True}, "exactly one"),
        ({"json": 5}, "json"),
        ({"json": ["a"]}, "json"),
        ({"regex": ""}, "regex"),
        ({"regex": 5}, "regex"),
        ({"grammar": b"start"}, "grammar"),
        ({"choice": []}, "choice"),
        ({"choice": "yes"}, "choice"),
        ({"choice": ["a", ""]}, "choice"),
        ({"choice": ["a"] * 10_001}, "10000"),
        ({"json_object": False}, "json_object"),
        ({"json_object": 1}, "json_object"),
        ({"structural_tag": {}}, "structural_tag"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace"),
        ({"json_object": True, "disable_additional_properties": True}, "disable_additional_properties"),
        ({"json": {}, "disable_any_whitespace": 1}, "disable_any_whitespace"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "whitespace_pattern"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern"),
    ],
    ids=str,
)
def test_refused_when_made(asked, named):
    with pytest.raises(InvalidRequestError, match=f"structured_outputs.*{named}"):
        StructuredOutputsParams(**asked)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"json": "{"}, "must be JSON"),
        ({"json": "[1]"}, "an object, true or false"),
        ({"json": {"const": object()}}, "must be JSON"),
        ({"json": {"const": float("nan")}}, "must be JSON"),
        ({"json": nested(100_000)}, "nested too deeply"),
        ({"json": '{"items":' * 100_000 + "{}" + "}" * 100_000}, "nested too deeply"),
        ({"json": {"enum": ["a" * MAX_GRAMMAR_BYTES]}}, "at most"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "at most"),
        ({"choice": ["a" * MAX_GRAMMAR_BYTES, "b"]}, "at most"),
        ({"regex": "\ud800"}, "Unicode"),
        ({"choice": ["\udfff"]}, "Unicode"),
        ({"structural_tag": "nope"}, "must be JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_refused_before_it_travels(asked, named):
    with pytest.raises(InvalidRequestError, match=named):
        StructuredOutputsParams(**asked).checked()


def test_a_checked_copy_is_the_callers_no_more():
    schema: dict = {"enum": ["é"]}
    asked = StructuredOutputsParams(json=schema)
    copy = asked.checked()
    schema["enum"].append("b")
    assert json.loads(copy.json) == {"enum": ["é"]} and asked.json is schema
    assert copy.checked() == copy


def test_where_it_may_stand():
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"structured_outputs.*beam search"):
        BeamSearchParams(beam_width=2, max_tokens=3, structured_outputs=StructuredOutputsParams(regex="a"))

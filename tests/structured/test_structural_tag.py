"""Structural tags: which texts they allow, and how what is wrong with them is named."""

import json
import re

import pytest

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.errors import InvalidRequestError
from jaxllm.structured.compiler import GrammarCompiler
from jaxllm.structured.vocabulary import Vocabulary

SPECIAL = 3  # <|call|>
TOKENS = [b"<unk>", b"<s>", b"</s>", b"<|call|>"] + [bytes([byte]) for byte in range(256)]
LONGER = [b'": ', b'{"', b'"}', b"}\n</", b"</think>", b">\n", b'{"name', b"<call", b">{", b"}</c"]

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
COUNT = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture(scope="module")
def own():
    """A compiler whose tokens span the borders between the parts."""
    compiler = GrammarCompiler(lambda: (Vocabulary(TOKENS + LONGER, [0, 1, 2, SPECIAL], [2]), None))
    yield compiler
    compiler.close()


def spell(text: str, *, longest: bool) -> list[int]:
    """Token ids of a text; § is the special token."""
    found, data = [], text.encode()
    while data:
        if data.startswith("§".encode()):
            found.append(SPECIAL)
            data = data.removeprefix("§".encode())
            continue
        ids = [i for i in range(4, len(TOKENS + LONGER)) if data.startswith((TOKENS + LONGER)[i])]
        best = max(ids, key=lambda i: len((TOKENS + LONGER)[i]) * (1 if longest else -1))
        found.append(best)
        data = data[len((TOKENS + LONGER)[best]) :]
    return found


def compiled(compiler, form: dict):
    tag = form if "structures" in form else {"type": "structural_tag", "format": form}
    params = StructuredOutputsParams(structural_tag=json.dumps(tag)).checked()
    return compiler.compile(params).result(timeout=60)


def const(value: str) -> dict:
    return {"type": "const_string", "value": value}


def of(schema: object, **more: object) -> dict:
    return {"type": "json_schema", "json_schema": schema, **more}


def sequence(*elements: dict) -> dict:
    return {"type": "sequence", "elements": list(elements)}


def either(*elements: dict) -> dict:
    return {"type": "or", "elements": list(elements)}


def tag(begin: object, content: dict, end: object) -> dict:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


ANY = {"type": "any_text"}
TOKEN = {"type": "token", "token": SPECIAL}
CALL = tag("<call=c>", of(CITY), "</call>")
OTHER = tag("<call=n>", of(COUNT), "</call>")
TRIGGERED = {"type": "triggered_tags", "triggers": ["<call="], "tags": [CALL, OTHER]}
LIST = {"type": "tags_with_separator", "tags": [CALL, OTHER], "separator": "; "}
C, N = '<call=c>{"city": "x"}</call>', '<call=n>{"n":1}</call>'

CASES: list[tuple[dict, list[str], list[str]]] = [
    (const("a/b\n"), ["a/b\n"], ["", "a"]),
    (of(COUNT), ['{"n":1}', '{"n": 1}'], ['{"n":"a"}', ""]),
    (of(COUNT, disable_any_whitespace=True), ['{"n":1}'], ['{"n": 1}']),
    (of(COUNT, whitespace_pattern=" "), ['{ "n": 1 }'], ['{"n":  1}']),
    ({"type": "regex", "pattern": "a+(/|\\/)[/]b?\n"}, ["aa//b\n", "a//\n"], ["/", "a//"]),
    ({"type": "grammar", "grammar": 'start: "(" start ")" | NAME\nNAME: /[a-z]+/'}, ["a", "((ab))"], ["((a)", ""]),
    ({"type": "grammar", "grammar": 'root ::= "x" ("+" root)?'}, ["x", "x+x"], ["x+"]),
    (sequence(const("["), of(COUNT), const("]"), ANY), ['[{"n":1}]', '[{"n":1}] é\n'], ['{"n":1}', '[{"n":1}']),
    (either(const("a"), const("ab"), const("b")), ["a", "ab", "b"], ["", "abb"]),
    (either(of(COUNT), sequence(const("<"), of(CITY))), ['{"n":1}', '<{"city":""}'], ['{"city":""}', '<{"n":1}']),
    (sequence({"type": "optional", "content": const("x")}, const("y")), ["y", "xy"], ["x", "xxy"]),
    (sequence({"type": "star", "content": const("x")}, const("y")), ["y", "xxy"], ["x"]),
    (sequence({"type": "plus", "content": const("x")}, const("y")), ["xy", "xxy"], ["y"]),
    (
        sequence(tag("<think>", ANY, "</think>"), of(COUNT)),
        ['<think>a<é</think>{"n":1}'],
        ['{"n":1}', "<think>a</think>"],
    ),
    (
        sequence(tag("", ANY, "</think>"), const("x")),
        ["</think>x", "yes</think>x"],
        ["x", "</think>y", "</think></think>x"],
    ),
    (sequence(tag(TOKEN, ANY, TOKEN), const("x")), ["§§x", "§ab§x"], ["x", "§ab§", "§a"]),
    (TRIGGERED, ["", "hi", C, f"hi {C}", f"{C}{N}", f"a {C} b {N} c", "<call", "a <call"], ["<call=x", f"hi {C[:-1]}"]),
    ({**TRIGGERED, "at_least_one": True}, [C, f"hi {C} b"], ["", "hi"]),
    ({**TRIGGERED, "stop_after_first": True}, ["", "hi", C, f"hi {N}"], [f"{C} b", f"{C}{N}"]),
    ({**TRIGGERED, "at_least_one": True, "stop_after_first": True}, [C, f"hi {N}"], ["", f"{C} b"]),
    (
        {
            "type": "triggered_tags",
            "triggers": [TOKEN],
            "tags": [tag(TOKEN, of(COUNT), ""), tag(TOKEN, const("z"), "")],
        },
        ["", "hi", 'hi §{"n":1}', '§{"n":1}§z', "§z a §z", "<|call|>"],
        ["§", "§a", 'hi §{"n"}'],
    ),
    (
        {
            "type": "triggered_tags",
            "triggers": ["aa", "ab"],
            "tags": [tag("aab", const("1"), ""), tag("ab", const("2"), "")],
        },
        ["", "xaab1", "ab2", "caab1 ab2", "ba"],
        ["aa", "ab", "aaab1", "xab1", "aab2"],
    ),
    (of(CITY, disable_additional_properties=True), ['{"city":"x"}'], ['{"city":"x","a":1}']),
    (
        sequence(const("x"), {"type": "structural_tag", "structural_tag": {"type": "structural_tag", "format": LIST}}),
        ["x", f"x{C}"],
        ["", C],
    ),
    (LIST, ["", C, f"{C}; {N}"], [f"{C}{N}", f"{C}; ", "a"]),
    ({**LIST, "at_least_one": True}, [C, f"{N}; {N}; {N}"], ["", "a"]),
    ({**LIST, "stop_after_first": True}, ["", C], [f"{C}; {N}"]),
    (
        {"structures": [{"begin": "<call=c>", "schema": CITY, "end": "</call>"}], "triggers": ["<call="]},
        ["", f"hi {C} x"],
        ["<call=n", f"{C}<call="],
    ),
]


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("longest", [False, True])
def test_texts(own, index, longest):
    form, valid, invalid = CASES[index]
    start = compiled(own, form)
    for text, wanted in [(text, True) for text in valid] + [(text, False) for text in invalid]:
        matcher, tokens = start.deep_copy(), spell(text, longest=longest)
        done = matcher.try_consume_tokens(tokens) if tokens else 0
        assert (done == len(tokens) and matcher.is_accepting()) is wanted, text


WRONG: list[tuple[object, str]] = [
    ({}, "'type' and 'format', or 'structures' and 'triggers'"),
    ([], "'type' and 'format'"),
    ({"type": "structural_tag"}, "needs 'format'"),
    ({"type": "structural_tag", "format": 1}, "format: must be an object"),
    ({"type": "structural_tag", "format": {"type": "poem"}}, "'poem' is none of"),
    ({"type": "structural_tag", "format": {"type": "regex"}}, "regex needs pattern"),
    ({"type": "structural_tag", "format": {**ANY, "excludes": ["a"]}}, "unknown key 'excludes'"),
    ({"type": "structural_tag", "format": sequence(ANY, const("a"))}, r"format.elements\[0\]: any_text goes on"),
    ({"type": "structural_tag", "format": sequence(TRIGGERED, const("a"))}, "nothing may follow"),
    ({"type": "structural_tag", "format": sequence()}, "not empty"),
    ({"type": "structural_tag", "format": either(const("a"), of({"not": {}}))}, '"not"'),
    ({"type": "structural_tag", "format": of({"pattern": "[a&&b]"})}, "format: pattern"),
    ({"type": "structural_tag", "format": {**TRIGGERED, "triggers": ["<tool"]}}, "no trigger begins '<call=c>'"),
    ({"type": "structural_tag", "format": {**TRIGGERED, "triggers": [""]}}, "must not be empty"),
    ({"type": "structural_tag", "format": {**TRIGGERED, "tags": [const("a")]}}, r"format.tags\[0\]: must be a tag"),
    ({"type": "structural_tag", "format": {**LIST, "at_least_one": 1}}, "true or false"),
    ({"type": "structural_tag", "format": {"type": "token", "token": "<s>"}}, "token id"),
    ({"structures": [{"begin": 1, "schema": {}, "end": ""}], "triggers": ["a"]}, "must be a string"),
    ({"structures": [], "triggers": []}, "at least one structure"),
]


@pytest.mark.parametrize("tag,reason", WRONG, ids=lambda value: str(value)[:50])
def test_what_is_wrong_is_named(compiler, tag, reason):
    with pytest.raises(InvalidRequestError) as caught:
        compiler.compile(StructuredOutputsParams(structural_tag=json.dumps(tag)).checked()).result(timeout=60)
    assert caught.value.field == "structured_outputs.structural_tag" and re.search(reason, caught.value.limit)


@pytest.mark.parametrize("schema,reason", [({"not": {}}, "not"), ({"minProperties": 2}, "minProperties=2")], ids=str)
def test_a_schema_with_a_name_is_refused_by_it(compiler, schema, reason):
    form = either(of(CITY, field="tools[0]"), sequence(const("a"), of(schema, field="tools[1]")))
    params = StructuredOutputsParams(structural_tag=json.dumps({"type": "structural_tag", "format": form}))
    with pytest.raises(InvalidRequestError, match=rf"tools\[1\]={re.escape(repr(schema))}: .*{reason}") as caught:
        compiler.compile(params.checked()).result(timeout=60)
    assert caught.value.field == "tools[1]"

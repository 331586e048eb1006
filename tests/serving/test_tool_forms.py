"""The forms of tool calls: whatever a grammar of them allows, the parser reads as calls of the tools."""

import json
import random

import pytest

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.serving.forms import Form, const, json_text, mark_of, params_of, regex
from jaxllm.serving.parsing import CallArguments, CallStart, Content
from jaxllm.serving.tools import PARSERS
from jaxllm.serving.tools.base import CallableTool
from jaxllm.serving.tools.json_calls import JsonCallsParser, NamedCallParser, json_calls
from jaxllm.structured.compiler import GrammarCompiler
from jaxllm.structured.vocabulary import Vocabulary

MARKERS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]
BYTES = [bytes([byte]) for byte in range(256)]
POINT = {
    "type": "object",
    "properties": {"x": {"enum": [1, -2, "}]"]}, "ok": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
    "required": ["x"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    CallableTool("get", json_text(POINT, "tools[0]", disable_any_whitespace=True)),
    CallableTool("get_all", json_text(NOTHING, "tools[1]", disable_any_whitespace=True)),
]
NATIVE = sorted(name for name in PARSERS if "pythonic" not in name)


class Tokens:
    """What `mark_of` asks of a tokenizer."""

    def __init__(self, special: bool):
        self.names = ["</s>", *MARKERS] if special else ["</s>"]
        self.special_ids = frozenset(range(len(self.names)))

    def token_to_id(self, text: str) -> int | None:
        return self.names.index(text) if text in self.names else None


@pytest.fixture(scope="module", params=[False, True], ids=["text", "special tokens"])
def world(request):
    """A tokenizer and a compiler for it."""
    tokens = Tokens(request.param)
    vocabulary = Vocabulary([name.encode() for name in tokens.names] + BYTES, sorted(tokens.special_ids), [0])
    compiler = GrammarCompiler(lambda: (vocabulary, None))
    yield tokens, vocabulary, compiler
    compiler.close()


def texts(world, form: Form, count: int, longest: int = 400) -> list[str]:
    """What random walks through a form's grammar spell, those that come to an end."""
    tokens, vocabulary, compiler = world
    start = compiler.compile(params_of(form).checked()).result(timeout=60)
    found = []
    for seed in range(count):
        draw, matcher, text = random.Random(seed), start.deep_copy(), b""
        for at in range(longest):
            mask = matcher.compute_bitmask()
            allowed = [t for t in range(len(vocabulary.tokens)) if mask[t // 8] >> t % 8 & 1]
            assert allowed
            token = (
                0 if 0 in allowed and (len(allowed) == 1 or draw.random() < 0.3 or at > 100) else draw.choice(allowed)
            )
            if token == 0:
                found.append(text.decode())
                break
            assert matcher.consume_token(token)
            text += vocabulary.tokens[token]
    assert len(found) > count // 2
    return found


def read(parser, text: str) -> tuple[str, list[tuple[str, dict]]]:
    """(content, calls) of an answer, fed in pieces."""
    events = [event for at in range(0, len(text), 3) for event in parser.feed(text[at : at + 3])] + parser.finish()
    names = [event.name for event in events if isinstance(event, CallStart)]
    arguments = ["" for _ in names]
    for event in events:
        if isinstance(event, CallArguments):
            arguments[event.index] += event.text
    content = "".join(event.text for event in events if isinstance(event, Content))
    return content, [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


def assert_fits(calls: list[tuple[str, dict]]) -> None:
    for name, arguments in calls:
        if name == "get_all":
            assert arguments == {}
        else:
            assert name == "get" and set(arguments) <= {"x", "ok"} and arguments["x"] in (1, -2, "}]")
            assert all(type(item) is bool for item in arguments.get("ok", ())) and len(arguments.get("ok", ())) <= 2


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("many", [False, True])
def test_calls(world, name, many):
    counts = set()
    for text in texts(world, PARSERS[name].calls(TOOLS, mark_of(world[0]), many), 12):
        content, calls = read(PARSERS[name](), text)
        assert not content.strip() and calls, text
        assert_fits(calls)
        counts.add(len(calls))
    assert counts == {1} if not many else max(counts) > 1


@pytest.mark.parametrize("name", NATIVE)
def test_calls_that_the_model_makes_by_itself(world, name):
    """Random bytes make no calls: their beginnings are spelled."""
    form = PARSERS[name].text_and_calls(TOOLS, mark_of(world[0]), True)
    params: StructuredOutputsParams = params_of(form)
    start = world[2].compile(params.checked()).result(timeout=60)
    (call,) = texts(world, PARSERS[name].calls(TOOLS[:1], mark_of(world[0]), False), 1)
    before = "" if "llama" in name else "Look: "

    def goes(text: str) -> bool:
        ids, names = [], world[0].names
        while text:
            marker = next((m for m in names[1:] if text.startswith(m)), None)
            ids += [names.index(marker)] if marker else [len(names) + byte for byte in text[0].encode()]
            text = text.removeprefix(marker) if marker else text[1:]
        matcher = start.deep_copy()
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    assert goes("") and goes("Hello, é <b>") and goes(before + call)
    assert not goes(before + call.replace("get", "gut")) and not goes(before + call.replace('"x"', '"y"'))
    content, calls = read(PARSERS[name](), before + call)
    assert content == before.strip() and len(calls) == 1
    assert_fits(calls)


@pytest.mark.parametrize("name", ["hermes", "mistral"])
def test_calls_or_another_form(world, name):
    found = texts(world, PARSERS[name].calls_or(regex("no|yes"), TOOLS, mark_of(world[0]), True), 20)
    read_back = [read(PARSERS[name](), text) for text in found]
    for content, calls in read_back:
        assert (content in ("no", "yes")) != bool(calls)
        assert_fits(calls)
    assert any(calls for _, calls in read_back) and any(content for content, _ in read_back)


def test_formats_without_a_marker_cannot_be_told_apart(world):
    for name in set(PARSERS) - {"hermes", "qwen", "mistral"}:
        assert PARSERS[name].calls_or(const("a"), TOOLS, mark_of(world[0]), True) is None


@pytest.mark.parametrize("many", [False, True])
def test_calls_as_json(world, many):
    for text in texts(world, json_calls(TOOLS, many), 10):
        content, calls = read(JsonCallsParser(), text)
        assert not content and [name for name, _ in calls] == [call["name"] for call in json.loads(text)]
        assert_fits(calls)


def test_a_named_call_is_its_arguments(world):
    for text in texts(world, TOOLS[0].arguments, 5):
        assert read(NamedCallParser("get"), text) == ("", [("get", json.loads(text))])

"""Parsers of tool calls and of reasoning: what they find, and that it does not depend on how the text was cut."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.serving.parsing import CallArguments, CallStart, Content, Event, Reasoning
from jaxllm.serving.reasoning import STYLES, ReasoningParser
from jaxllm.serving.text_parser import TextParser
from jaxllm.serving.tools import PARSERS


def joined(events: list[Event]) -> list[Event]:
    """Events with adjacent texts of a kind as one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        same = type(last) is type(event) and not isinstance(event, CallStart)
        if same and getattr(last, "index", 0) == getattr(event, "index", 0):
            last.text += event.text
        else:
            out.append(type(event)(**{name: getattr(event, name) for name in event.__slots__}))
    return out


def parse(parser, text: str, cuts=()) -> list[Event]:
    events = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)]):
        events += parser.feed(text[begin:end])
    return joined(events + parser.finish())


def calls(events: list[Event]) -> list[tuple[str, object]]:
    """[(name, arguments)]"""
    found = []
    for event in events:
        if isinstance(event, CallStart):
            found.append((event.name, ""))
            assert event.index == len(found) - 1
        elif isinstance(event, CallArguments):
            assert event.index == len(found) - 1
            found[-1] = (found[-1][0], found[-1][1] + event.text)
    return [(name, json.loads(text)) for name, text in found]


def content(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


ARGUMENTS = {"city": 'Wien, "1." Bezirk', "days": [1, {"x": "}{]["}], "é": None, "deep": {"a": {"b": [[]]}}}


def written(name: str, calls: list[tuple[str, dict]]) -> str:
    """Calls as a model of that parser writes them."""
    if name in ("hermes", "qwen"):
        return "\n".join(
            "<tool_call>\n" + json.dumps({"name": call, "arguments": arguments}) + "\n</tool_call>"
            for call, arguments in calls
        )
    if name in ("llama3_json", "llama4_json"):
        return "; ".join(json.dumps({"name": call, "parameters": arguments}) for call, arguments in calls)
    if name == "mistral":
        return "[TOOL_CALLS] " + json.dumps([{"name": call, "arguments": arguments} for call, arguments in calls])
    inner = [
        f"{call}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" for call, arguments in calls
    ]
    return f"[{', '.join(inner)}]"


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_calls_are_found(name):
    wanted = [("weather", ARGUMENTS), ("now", {}), ("f", {"a": 1})]
    events = parse(PARSERS[name](), written(name, wanted))
    assert calls(events) == wanted and not content(events)
    (one,) = calls(parse(PARSERS[name](), written(name, wanted[:1])))
    assert one == wanted[0]


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_text_without_calls_is_text(name):
    texts = [
        "",
        "Hello there.",
        "  padded \n",
        "a < b and {x} [1, 2]",
        "<tool",
        "[TOOL_CALL",
        "{not json",
        '{"a": 1}',
        "[1, 2]",
        "[f",
    ]
    for text in texts:
        events = parse(PARSERS[name](), text)
        assert not calls(events)
        assert content(events).strip() == text.strip() and content(events) in text


def test_text_beside_calls():
    text = "I will look.\n\n" + written("hermes", [("f", {}), ("g", {})]) + "\nDone."
    events = parse(PARSERS["hermes"](), text)
    assert [type(event) for event in events] == [Content, CallStart, CallArguments, CallStart, CallArguments, Content]
    assert content(events) == "I will look." + "\nDone."
    events = parse(PARSERS["mistral"](), "Well.[TOOL_CALLS]" + written("mistral", [("f", {})])[12:])
    assert content(events) == "Well." and calls(events) == [("f", {})]


def test_a_calls_end_that_is_cut_short_is_no_content():
    text = "So:" + written("hermes", [("f", {"a": 1})])
    for length in range(text.index("</tool_call>"), len(text)):
        events = parse(PARSERS["hermes"](), text[:length])
        assert content(events) == "So:" and calls(events) == [("f", {"a": 1})]
    assert content(parse(PARSERS["hermes"](), text + " a <")) == "So: a <"


def test_the_formats_variants():
    assert calls(
        parse(PARSERS["llama3_json"](), '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}')
    ) == [("f", {})]
    assert calls(parse(PARSERS["hermes"](), '<tool_call>{"arguments": {"a": [1]}, "name": "f"}</tool_call>')) == [
        ("f", {"a": [1]})
    ]
    assert calls(parse(PARSERS["hermes"](), '<tool_call>{"name": "f"}')) == [("f", {})]
    assert calls(parse(PARSERS["hermes"](), '<tool_call>{"name": "f", "arguments": "{\\"a\\": 2}"}')) == [
        ("f", {"a": 2})
    ]
    for text in (
        '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{}',
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}',
    ):
        assert calls(parse(PARSERS["mistral"](), text)) == [("f", {"a": 1}), ("g", {})]
    text = "<|python_start|>[f(a='x(]', b=true, c=null, d=-1.5), m.g()]<|python_end|>"
    assert calls(parse(PARSERS["pythonic"](), text)) == [
        ("f", {"a": "x(]", "b": True, "c": None, "d": -1.5}),
        ("m.g", {}),
    ]


def test_no_code_is_run():
    for text in (
        "[f(a=__import__('os'))]",
        "[f(a=[x for x in y])]",
        "[f(*a)]",
        "[f(**{})]",
        "[f(1)]",
        "[(lambda: 1)()]",
    ):
        events = parse(PARSERS["pythonic"](), text)
        assert not calls(events) and content(events) == text


PIECES = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    "<|python_start|>",
    "<think>",
    "</think>",
    "[THINK]",
    "[/THINK]",
    '{"name": "f", "arguments": {"a": "}\\""}}',
    '{"name": "g", "parameters": {}}',
    "[f(a='[', b=2)]",
    "f(x=1)",
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    ",",
    ";",
    ":",
    "\n",
    " ",
    "word",
    "'",
    "(",
    ")",
    "é",
    '"name"',
    "name",
    "null",
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=14).map("".join)


@pytest.mark.parametrize("name", sorted(set(PARSERS) - {"qwen", "llama4_json", "llama4_pythonic"}))
@settings(max_examples=250, deadline=None)
@given(text=TEXTS, data=st.data())
def test_tool_events_do_not_depend_on_the_cuts(name, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    whole = parse(PARSERS[name](), text)
    assert parse(PARSERS[name](), text, cuts) == whole
    assert parse(PARSERS[name](), text, range(1, len(text))) == whole
    for event in whole:  # nothing is made up
        if isinstance(event, Content):
            assert event.text
    calls_of = [event.index for event in whole if isinstance(event, CallStart)]
    assert calls_of == list(range(len(calls_of)))


@pytest.mark.parametrize("style", ["deepseek_r1", "qwen3", "mistral"])
@settings(max_examples=150, deadline=None)
@given(
    text=TEXTS, prompt=st.sampled_from(["<a>", "<a><think>\n", "<think>\n\n</think>\n\n", "[THINK]"]), data=st.data()
)
def test_reasoning_does_not_depend_on_the_cuts(style, text, prompt, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    whole = parse(ReasoningParser(STYLES[style], prompt), text)
    assert parse(ReasoningParser(STYLES[style], prompt), text, cuts) == whole
    assert parse(ReasoningParser(STYLES[style], prompt), text, range(1, len(text))) == whole
    assert sum(len(event.text) for event in whole) <= len(text)


@pytest.mark.parametrize(
    "style,prompt,text,reasoning,answer",
    [
        ("qwen3", "<a>", "<think>\nhm\n</think>\n\nYes.", "hm", "Yes."),
        ("qwen3", "<a>", "Yes. <think>no</think>", "", "Yes. <think>no</think>"),
        ("qwen3", "<a><think>\n", "hm\n</think>\n\nYes.", "hm", "Yes."),
        ("qwen3", "<think>\n\n</think>\n\n", "Yes.", "", "Yes."),
        ("deepseek_r1", "<a>", "hm</think>Yes.", "hm", "Yes."),
        ("deepseek_r1", "<a>", "hm, without an end", "hm, without an end", ""),
        ("mistral", "<a>", "[THINK]hm[/THINK]Yes.", "hm", "Yes."),
    ],
)
def test_reasoning_is_parted_from_the_answer(style, prompt, text, reasoning, answer):
    events = parse(ReasoningParser(STYLES[style], prompt), text)
    assert "".join(event.text for event in events if isinstance(event, Reasoning)) == reasoning
    assert content(events) == answer


def test_calls_after_reasoning():
    text = "<think>Should I <tool_call>? Yes.</think>\n" + written("hermes", [("f", {"a": 1})])
    parser = TextParser(ReasoningParser(STYLES["qwen3"], ""), PARSERS["hermes"]())
    events = parse(parser, text)
    assert events[0] == Reasoning("Should I <tool_call>? Yes.") and calls(events) == [("f", {"a": 1})]
    assert not content(events)


def test_the_documents_name_every_parser(root):
    text = (root / "docs" / "serving.md").read_text()
    assert not [name for name in (*PARSERS, *STYLES) if f"`{name}`" not in text]

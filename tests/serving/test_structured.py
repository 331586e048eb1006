"""Outputs that must have a form, over every endpoint: what has ended by itself has it, whatever else is asked for."""

import concurrent.futures
import json
import re
import threading
import time

import httpx2
import pytest

from jaxllm.serving.batch import OutputFile, run_batch
from tests.engine import tiny

HELLO = [{"role": "user", "content": "the hand"}]
POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": -99, "maximum": 99},
        "name": {"type": "string", "maxLength": 4},
        "tags": {"type": "array", "items": {"enum": ["the", "and", 'o"n']}, "maxItems": 2},
    },
    "required": ["x", "name"],
    "additionalProperties": False,
}
SPACES = [*(tiny.FIRST_BYTE + ord(c) for c in " \n\t\r"), *(tiny.VOCAB - 300 + 272 + i for i in range(3))]
NO_SPACES = {str(token): -100 for token in SPACES}  # random weights would go on with them for long
SAMPLED = {"logit_bias": NO_SPACES, "temperature": 1.0, "max_tokens": 150}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}}


def tool(name: str, schema: dict | None, **more: object) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


TOOLS = [tool("point", POINT), tool("ping", None)]


def fits(text: str) -> bool:
    value = json.loads(text)
    return (
        {"x", "name"} <= set(value) <= {"x", "name", "tags"}
        and type(value["x"]) is int
        and abs(value["x"]) <= 99
        and len(value["name"]) <= 4
        and set(value.get("tags", ())) <= {"the", "and", 'o"n'}
    )


def chat(server, stream: bool, **body) -> list[dict]:
    """The choices of an answer; a stream's deltas joined: content, reasoning, tool_calls, logprobs, finish_reason."""
    body = {"messages": HELLO, **SAMPLED, **body}
    if not stream:
        answer = server.post("/v1/chat/completions", **body)
        assert answer.status_code == 200, answer.text
        return [choice | choice["message"] for choice in answer.json()["choices"]]
    found: dict[int, dict] = {}
    for event in server.events("/v1/chat/completions", **body):
        for piece in event["choices"]:
            choice = found.setdefault(
                piece["index"], {"content": "", "reasoning": "", "tool_calls": [], "logprobs": None}
            )
            delta = piece["delta"]
            choice["content"] += delta.get("content") or ""
            choice["reasoning"] += delta.get("reasoning") or ""
            for call in delta.get("tool_calls") or []:
                if "id" in call:
                    choice["tool_calls"].append({"function": {"name": call["function"]["name"], "arguments": ""}})
                choice["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            if piece["logprobs"]:
                choice["logprobs"] = choice["logprobs"] or {"content": []}
                choice["logprobs"]["content"] += piece["logprobs"]["content"]
            choice["finish_reason"] = piece["finish_reason"] or choice.get("finish_reason")
    return [found[index] for index in sorted(found)]


@pytest.fixture
def plain(server, monkeypatch):
    """The server without a reasoning parser."""
    monkeypatch.setattr(server.services.config, "reasoning_parser", None)
    return server


def ended(choices: list[dict], *reasons: str) -> list[dict]:
    """Those that ended by themselves; at least one has to."""
    assert {choice["finish_reason"] for choice in choices} <= {"stop", "length", "tool_calls"}
    found = [choice for choice in choices if choice["finish_reason"] in (reasons or ("stop",))]
    assert found, choices
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "wishes", [{}, {"logprobs": True, "top_logprobs": 3}, {"stop": ["qq"], "top_k": 30}, {"temperature": 2.0}], ids=str
)
def test_a_schema(plain, stream, wishes):
    choices = chat(plain, stream, response_format=JSON_SCHEMA, n=4, seed=3, **wishes)
    assert len(choices) == 4
    for choice in ended(choices):
        assert fits(choice["content"]), choice["content"]
        if "logprobs" in wishes:
            values = [e["logprob"] for entry in choice["logprobs"]["content"] for e in (entry, *entry["top_logprobs"])]
            assert all(-9999 <= value <= 0 for value in values) and -9999 in values


def test_streamed_or_whole_an_answer_is_the_same(plain):
    body = dict(response_format=JSON_SCHEMA, n=3, seed=11)
    assert [c["content"] for c in chat(plain, True, **body)] == [c["content"] for c in chat(plain, False, **body)]


def test_cut_short_it_is_a_beginning(plain):
    (cut,) = chat(plain, False, response_format=JSON_SCHEMA, seed=3, max_tokens=4)
    (longer,) = chat(plain, False, response_format=JSON_SCHEMA, seed=3)
    assert cut["finish_reason"] == "length" and longer["content"].startswith(cut["content"]) and cut["content"]


def test_any_object(plain):
    body = dict(response_format={"type": "json_object"}, n=8, seed=5, max_tokens=200)
    body["logit_bias"] = NO_SPACES | {str(tiny.FIRST_BYTE + ord(c)): 9 for c in '"}'}
    for choice in ended(chat(plain, False, **body)):
        assert isinstance(json.loads(choice["content"]), dict)


TAG = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"},
}
KINDS: list[tuple[dict, str]] = [
    ({"json": POINT, "disable_any_whitespace": True}, ""),
    ({"json": json.dumps(POINT), "whitespace_pattern": " "}, ""),
    ({"regex": "(the|an)[0-9]{2,3}"}, "(the|an)[0-9]{2,3}"),
    ({"choice": ["the", "there", "other"]}, "the|there|other"),
    ({"grammar": 'start: "(" LEAF ("+" LEAF)* ")"\nLEAF: "a" | "b"'}, r"\([ab](\+[ab])*\)"),
    ({"structural_tag": json.dumps(TAG)}, "(?s)<a>.*</a>"),
    ({"structural_tag": TAG}, "(?s)<a>.*</a>"),
]


@pytest.mark.parametrize("asked,pattern", KINDS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_every_kind_over_every_endpoint(plain, path, asked, pattern):
    text = (
        {"messages": HELLO}
        if "chat" in path
        else {"input": "the"}
        if "responses" in path
        else {"prompt": ["the", "on"]}
    )
    body = {**text, "structured_outputs": asked, "temperature": 1.0}
    body |= {"max_output_tokens": 150} if "responses" in path else SAMPLED | {"n": 2}
    found = 0
    for seed in range(4):
        answer = plain.post(path, **body, seed=seed)
        assert answer.status_code == 200, answer.text
        answer = answer.json()
        if "responses" in path:
            texts = [answer["output"][0]["content"][0]["text"]] if answer["status"] == "completed" else []
        else:
            done = [choice for choice in answer["choices"] if choice["finish_reason"] == "stop"]
            texts = [choice["message"]["content"] if "chat" in path else choice["text"] for choice in done]
        found += len(texts)
        for said in texts:
            assert re.fullmatch(pattern, said) if pattern else fits(said), said
    assert found or ".*" in pattern or "responses" in path


@pytest.mark.parametrize(
    "form", [{"type": "json_schema", "name": "p", "schema": POINT, "strict": True}, {"type": "json_object"}]
)
def test_a_responses_text_format(plain, form):
    bodies = [
        dict(input="the", text={"format": form}, max_output_tokens=200, seed=seed, temperature=0.3) for seed in range(6)
    ]
    done = [
        answer for body in bodies if (answer := plain.post("/v1/responses", **body).json())["status"] == "completed"
    ]
    for answer in done:
        text = answer["output"][0]["content"][0]["text"]
        assert fits(text) if form["type"] == "json_schema" else isinstance(json.loads(text), dict)
        assert answer["text"] == {"format": form}
    assert plain.post("/v1/responses", **bodies[0], stream=True).text.count("response.output_text.done") <= 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parser", [None, "hermes", "llama3_json", "mistral", "pythonic"])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_calls_that_have_to_be_made(plain, monkeypatch, stream, parser, choice):
    monkeypatch.setattr(plain.services.config, "tool_call_parser", parser)
    named = {"type": "function", "function": {"name": "point"}}
    wanted = {"tools": TOOLS, "tool_choice": named if choice == "named" else "required", "parallel_tool_calls": False}
    choices = chat(plain, stream, **wanted, n=4, seed=2)
    for answer in ended(choices, "stop" if choice == "named" else "tool_calls"):
        (call,) = answer["tool_calls"]
        assert not answer["content"]
        function = call["function"]
        assert fits(function["arguments"]) if function["name"] == "point" else json.loads(function["arguments"]) == {}
        assert function["name"] == "point" or choice == "required"


@pytest.mark.parametrize("stream", [False, True])
def test_strict_tools_that_may_be_called(plain, stream):
    """Random weights do not begin a call: the bias makes them."""
    tools = [tool("point", POINT, strict=True), tool("ping", None)]
    likely = {str(tiny.FIRST_BYTE + ord("<")): 6, str(tiny.EOS): 3}
    choices = chat(plain, stream, tools=tools, logit_bias=NO_SPACES | likely, n=6, seed=1, max_tokens=300)
    calls = [call["function"] for choice in choices for call in choice.get("tool_calls") or ()]
    for choice in ended(choices, "stop", "tool_calls"):
        for call in choice.get("tool_calls") or ():
            function = call["function"]
            assert fits(function["arguments"]) if function["name"] == "point" else function["name"] == "ping"
    assert all(call["name"] in ("point", "ping") for call in calls)


def test_calls_or_a_form(plain):
    body = dict(tools=TOOLS, response_format=JSON_SCHEMA, n=12, seed=4)
    for choice in ended(chat(plain, False, **body), "stop", "tool_calls"):
        assert bool(choice.get("tool_calls")) != bool(choice["content"])
        if choice["content"]:
            assert fits(choice["content"])


@pytest.mark.parametrize(
    "lead,style", [("<think>", "qwen3"), ("", "qwen3"), ("<think></think>", "qwen3"), ("", "deepseek_r1")]
)
@pytest.mark.parametrize("tools", [False, True])
def test_reasoning_is_free_and_what_follows_has_its_form(server, monkeypatch, lead, style, tools):
    monkeypatch.setattr(server.services.config, "reasoning_parser", style)
    likely = {str(tiny.FIRST_BYTE + ord(c)): 4 for c in "</"} if lead != "<think></think>" else {}
    body: dict = dict(chat_template_kwargs={"lead": lead}, n=8, seed=6, max_tokens=400, logit_bias=NO_SPACES | likely)
    body |= {"tools": TOOLS, "tool_choice": "required"} if tools else {"response_format": JSON_SCHEMA}
    choices = chat(server, False, **body)
    for choice in choices:
        if choice["finish_reason"] == "length":
            continue
        if tools:
            assert choice["tool_calls"] and not choice["content"]
        else:
            assert fits(choice["content"])
    if lead == "<think></think>":
        assert ended(choices, "stop", "tool_calls") and not any(choice.get("reasoning") for choice in choices)


def test_neighbours_do_not_notice(plain):
    free = dict(messages=HELLO, temperature=0, max_tokens=40, ignore_eos=True, return_token_ids=True)
    formed = dict(messages=HELLO, response_format=JSON_SCHEMA, seed=9, **SAMPLED, return_token_ids=True)

    def tokens(answer) -> list[int]:
        return answer.json()["choices"][0]["token_ids"]

    alone = [tokens(plain.post("/v1/chat/completions", **body)) for body in (free, formed)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda at: plain.post("/v1/chat/completions", **(free, formed)[at % 2]), range(16)))
    assert [tokens(answer) for answer in answers] == alone * 8


def json_schema(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


BAD = {"type": "object", "properties": {"a": {"not": {}}}}
REFUSED: list[tuple[str, dict, str, str]] = [
    ("chat", {"response_format": json_schema(BAD)}, "response_format", "not"),
    ("chat", {"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    (
        "chat",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        "required",
    ),
    ("chat", {"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    ("chat", {"response_format": {"type": "json_object", "x": 1}}, "response_format.x", "unknown"),
    ("chat", {"response_format": {"type": "structural_tag", "format": {"type": "poem"}}}, "response_format", "poem"),
    ("chat", {"response_format": {"type": "structural_tag"}}, "response_format", "format or structures and triggers"),
    ("chat", {"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-around"),
    ("chat", {"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    ("chat", {"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ("chat", {"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one"),
    ("chat", {"structured_outputs": {"xml": ""}}, "structured_outputs.xml", "unknown field"),
    (
        "chat",
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "response_format",
    ),
    ("chat", {"guided_regex": "a"}, "guided_regex", "structured_outputs"),
    ("chat", {"tools": [tool("f", BAD)], "tool_choice": "required"}, "tools[0].function.parameters", "not"),
    ("chat", {"tools": [*TOOLS, tool("f", BAD, strict=True)]}, "tools[2].function.parameters", "not"),
    (
        "chat",
        {"tools": [tool("f", {"type": "string"})], "tool_choice": "required"},
        "tools[0].function.parameters",
        "object",
    ),
    (
        "chat",
        {"tools": TOOLS, "tool_choice": "required", "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "required",
    ),
    ("completion", {"response_format": json_schema(BAD)}, "response_format", "not"),
    ("completion", {"structured_outputs": {"grammar": "start: missing"}}, "structured_outputs.grammar", "missing"),
    ("completion", {"structured_outputs": {"json": "{"}}, "structured_outputs.json", "must be JSON"),
    ("response", {"text": {"format": {"type": "json_schema", "name": "a", "schema": BAD}}}, "text.format", "not"),
    ("response", {"text": {"format": {"type": "json_object", "name": "a"}}}, "text.format", "nothing else"),
    ("response", {"structured_outputs": {"json": BAD}}, "structured_outputs.json", "not"),
    (
        "response",
        {"tools": [{"type": "function", "name": "f", "parameters": BAD, "strict": True}]},
        "tools[0].parameters",
        "not",
    ),
]
PATHS = {
    "chat": ("/v1/chat/completions", {"messages": HELLO}),
    "completion": ("/v1/completions", {"prompt": "the"}),
    "response": ("/v1/responses", {"input": "the"}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind,body,field,limit", REFUSED, ids=lambda value: str(value)[:40])
def test_refusals_name_the_field_and_the_reason(server, kind, body, field, limit, stream):
    path, text = PATHS[kind]
    answer = server.http.post(path, json={**text, **body, "stream": stream})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field and limit in error["message"] and error["message"].startswith(field), error


BAD_TAG = {"type": "structural_tag", "format": {"type": "regex", "pattern": "(ab"}}


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ({"structured_outputs": {"regex": "(ab"}}, "structured_outputs.regex='(ab': "),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar='start: x': "),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar='root ::= (': "),
        ({"structured_outputs": {"structural_tag": BAD_TAG}}, f"structured_outputs.structural_tag={BAD_TAG}: "),
        ({"response_format": BAD_TAG}, f"response_format={BAD_TAG}: "),
    ],
    ids=str,
)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_refusal_shows_the_clients_value_though_it_is_a_part_of_more(server, body, shown, tools):
    """The form is put together with the reasoning before it, and with the calls that may stand in its place."""
    answer = server.post("/v1/chat/completions", messages=HELLO, tools=tools, **body)
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert message.startswith(shown) and "think" not in message, message


def test_forms_that_a_parser_does_not_have_are_refused(plain, monkeypatch):
    monkeypatch.setattr(plain.services.config, "tool_call_parser", "pythonic")
    strict = [tool("point", POINT, strict=True)]
    error = plain.post("/v1/chat/completions", messages=HELLO, tools=strict).json()["error"]
    assert error["param"] == "tools[0].function.strict" and "pythonic" in error["message"]
    monkeypatch.setattr(plain.services.config, "tool_call_parser", "llama3_json")
    error = plain.post("/v1/chat/completions", messages=HELLO, tools=TOOLS, response_format=JSON_SCHEMA).json()["error"]
    assert error["param"] == "response_format" and "llama3_json" in error["message"]


def test_what_the_grammar_and_the_rest_forbid_together_is_an_error(plain):
    body = dict(messages=HELLO, structured_outputs={"choice": ["the"]}, min_tokens=9, max_tokens=20)
    answer = plain.post("/v1/chat/completions", **body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and (error["param"], error["code"]) == ("min_tokens", "no_token_left")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_may_leave_while_its_grammar_compiles(plain, monkeypatch, stream):
    compiler = plain.services.llm._client._core._grammars._compiler
    compile, let_go = compiler._compile, threading.Event()
    monkeypatch.setattr(compiler, "_compile", lambda params: (let_go.wait(60), compile(params))[1])
    body = {"prompt": "the", "structured_outputs": {"regex": f"never{stream}[0-9]"}, "stream": stream}
    with pytest.raises(httpx2.TimeoutException):
        plain.http.post("/v1/completions", json=body, timeout=0.5)
    deadline = time.monotonic() + 30
    while plain.call(lambda: plain.services.admission.samples) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert plain.call(lambda: plain.services.admission.samples) == 0
    late = plain.http.post("/v1/completions", json=body | {"stream": False}, headers={"x-request-timeout": "0.3"})
    assert late.status_code == 504
    let_go.set()
    answer = plain.post("/v1/completions", **body | {"stream": False})
    assert re.fullmatch(f"never{stream}[0-9]", answer.json()["choices"][0]["text"])


def test_lines_of_a_batch(plain, tmp_path):
    rows = [
        ("/v1/chat/completions", {"messages": HELLO, "response_format": JSON_SCHEMA, **SAMPLED, "seed": 3}),
        ("/v1/completions", {"prompt": "the", "structured_outputs": {"choice": ["on", "in"]}, **SAMPLED}),
        ("/v1/completions", {"prompt": "the", "structured_outputs": {"regex": "("}}),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"custom_id": str(i), "method": "POST", "url": url, "body": body} for i, (url, body) in enumerate(rows)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with OutputFile(target) as output:
        plain.call(lambda: run_batch(plain.services, source, output, 3))
    found = {row["custom_id"]: row["response"] for row in map(json.loads, target.read_text().splitlines())}
    first = found["0"]["body"]["choices"][0]
    assert fits(first["message"]["content"]) if first["finish_reason"] == "stop" else first["finish_reason"] == "length"
    assert found["1"]["body"]["choices"][0]["text"] in ("on", "in")
    assert found["2"]["status_code"] == 400 and found["2"]["body"]["error"]["param"] == "structured_outputs.regex"


def test_the_template_does_not_see_strict(server):
    """Prompts are those that a client gets who does not ask for it."""
    body = dict(messages=HELLO, temperature=0, max_tokens=1, tool_choice="none")
    usage = [
        server.post("/v1/chat/completions", **body, tools=[tool("f", {}, **more)]).json()["usage"]
        for more in ({}, {"strict": True})
    ]
    assert usage[0]["prompt_tokens"] == usage[1]["prompt_tokens"]

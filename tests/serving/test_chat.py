"""/v1/chat/completions: the conversation's prompt, answers, tools and reasoning."""

import json

import pytest

from jaxllm import SamplingParams
from tests.serving.harness import running, scripted

HELLO = [{"role": "user", "content": "the hand"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Wien", "n": [1, 2]}}\n</tool_call>'


def expected(server, text, **params):
    ids = server.services.llm.get_tokenizer().encode(text, add_special_tokens=False)
    wanted = SamplingParams(**{"temperature": 0, "max_tokens": 16, **params})
    return server.call(server.services.llm.complete, ids, wanted)


@pytest.mark.parametrize("stream", [False, True])
def test_the_templates_prompt_goes_to_the_engine(server, stream):
    messages = [{"role": "developer", "content": "in"}, {"role": "user", "content": [{"type": "text", "text": "the"}]}]
    output = expected(server, "<s>in<u>the<a>", logprobs=2, n=2)
    body = dict(messages=messages, temperature=0, max_completion_tokens=16, logprobs=True, top_logprobs=2, n=2)
    body |= {"return_token_ids": True, "model": "tiny"}
    if stream:
        events = server.events("/v1/chat/completions", **body)
        assert events[0]["prompt_token_ids"] == output.prompt_token_ids
        assert {event["object"] for event in events} == {"chat.completion.chunk"}
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        pieces = [event["choices"][0] for event in events]
    else:
        answer = server.post("/v1/chat/completions", **body).json()
        assert answer["prompt_token_ids"] == output.prompt_token_ids and answer["object"] == "chat.completion"
        pieces = [{**choice, "delta": choice["message"]} for choice in answer["choices"]]
    for index, sample in enumerate(output.outputs):
        own = [piece for piece in pieces if piece["index"] == index]
        assert "".join(piece["delta"].get("content") or "" for piece in own) == sample.text
        assert own[-1]["finish_reason"] == sample.finish_reason
        assert [token for piece in own for token in piece.get("token_ids") or []] == sample.token_ids
        entries = [entry for piece in own if piece["logprobs"] for entry in piece["logprobs"]["content"]]
        wanted = [logprobs[token].logprob for token, logprobs in zip(sample.token_ids, sample.logprobs)]
        assert [entry["logprob"] for entry in entries] == pytest.approx(wanted, abs=1e-4)
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
        spelled = b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")
        assert spelled == sample.text


def test_max_tokens_defaults_to_the_context(server):
    answer = server.post("/v1/chat/completions", messages=HELLO, ignore_eos=True, temperature=0).json()
    assert answer["usage"]["total_tokens"] == 512 and answer["choices"][0]["finish_reason"] == "length"


def test_a_final_message_goes_on(server):
    messages = [*HELLO, {"role": "assistant", "content": "in the r"}]
    body = dict(messages=messages, temperature=0, max_tokens=16)
    answer = server.post(
        "/v1/chat/completions", **body, add_generation_prompt=False, continue_final_message=True
    ).json()
    assert answer["choices"][0]["message"]["content"] == expected(server, "<u>the hand<a>in the r").outputs[0].text
    refused = server.post("/v1/chat/completions", **body, continue_final_message=True)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "continue_final_message"


def test_template_variables(server):
    body = dict(messages=HELLO, temperature=0, max_tokens=4)
    answer = server.post("/v1/chat/completions", **body, chat_template_kwargs={"lead": "an"}).json()
    assert (
        answer["choices"][0]["message"]["content"] == expected(server, "<u>the hand<a>an", max_tokens=4).outputs[0].text
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_with_reasoning_before_it(client, script, stream):
    script.append(f"<think>\nLook it up.\n</think>\nOne moment. {CALL}\n{CALL}")
    create = client.chat.completions.create
    if not stream:
        (choice,) = create(model="s", messages=HELLO, tools=[TOOL]).choices
        message, reason = choice.message, choice.finish_reason
        content, reasoning = message.content, message.reasoning
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
        ids = {call.id for call in message.tool_calls}
    else:
        content, reasoning, calls, ids = "", "", [], set()
        for chunk in create(model="s", messages=HELLO, tools=[TOOL], stream=True):
            (choice,) = chunk.choices
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning", None) or ""
            for call in choice.delta.tool_calls or []:
                if call.id:
                    calls.append([call.function.name, ""])
                    ids.add(call.id)
                calls[call.index][1] += call.function.arguments
            reason = choice.finish_reason
    assert (content, reasoning, reason) == ("One moment.", "Look it up.", "tool_calls")
    assert len(ids) == 2 and [name for name, _ in calls] == ["weather", "weather"]
    assert all(json.loads(arguments) == {"city": "Wien", "n": [1, 2]} for _, arguments in calls)


def test_one_call_where_parallel_ones_are_unwanted(client, script):
    script += [f"{CALL}{CALL}"] * 2
    options = dict(model="s", messages=HELLO, tools=[TOOL], parallel_tool_calls=False)
    assert len(client.chat.completions.create(**options).choices[0].message.tool_calls) == 1
    pieces = [
        chunk.choices[0].delta.tool_calls or [] for chunk in client.chat.completions.create(**options, stream=True)
    ]
    assert {call.index for piece in pieces for call in piece} == {0}


def test_named_and_required_calls(client, script):
    script += [CALL, f"{CALL}\n{CALL}"]
    named = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(model="s", messages=HELLO, tools=[TOOL], tool_choice=named)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Wien", "n": [1, 2]}
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.content is None
    answer = client.chat.completions.create(model="s", messages=HELLO, tools=[TOOL], tool_choice="required")
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["weather", "weather"]
    assert answer.choices[0].finish_reason == "tool_calls"


def test_no_tools_no_parsing(client, script):
    script += [CALL, CALL]
    for options in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        choice = client.chat.completions.create(model="s", messages=HELLO, **options).choices[0]
        assert choice.message.content == CALL and choice.finish_reason == "stop" and not choice.message.tool_calls


def test_reasoning_can_be_left_out(stub, script):
    script += ["<think>hm</think>Yes."] * 2
    body = dict(messages=HELLO, include_reasoning=False)
    message = stub.post("/v1/chat/completions", **body).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Yes.", "refusal": None}
    events = stub.events("/v1/chat/completions", **body)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "Yes."


def test_a_conversation_with_calls_goes_back_in(server):
    ignored = {"provider_specific_fields": {"refusal": None}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}} | ignored
    said = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "reasoning_content": "hm"}
    said |= ignored
    messages = [*HELLO, said, {"role": "tool", "tool_call_id": "1", "content": "ok"}]
    answer = server.post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=4).json()
    wanted = expected(server, '<u>the hand<a>f{"a": 1}<t>ok<a>', max_tokens=4).outputs[0].text
    assert answer["choices"][0]["message"]["content"] == wanted


OTHER = {"type": "function", "function": {"name": "g"}}
NO_OBJECT = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}
IMAGE = [{"type": "image_url", "image_url": {"url": "data:,"}}]
REFUSED = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content", "image_url"),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "assistant"),
    ({"messages": [{"role": "user", "content": "", "x": 1}]}, "messages[0].x", "unknown field"),
    ({"messages": HELLO, "audio": {}}, "audio", "text only"),
    ({"messages": HELLO, "store": True}, "store", "stored"),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"messages": HELLO, "tool_choice": "auto"}, "tool_choice", "needs tools"),
    ({"messages": HELLO, "tools": [TOOL], "tool_choice": OTHER}, "tool_choice", "weather"),
    ({"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template", "operator"),
    ({"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "itself"),
    ({"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one"),
    ({"messages": HELLO, "max_tokens": 0}, "max_tokens", "at least 1"),
    ({"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    ({"messages": [NO_OBJECT]}, "messages[0].tool_calls", "object"),
]  # fmt: skip


@pytest.mark.parametrize("body,field,limit", REFUSED, ids=lambda value: str(value)[:40])
def test_refusals_name_the_field_and_the_limit(server, body, field, limit):
    answer = server.http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field and limit in error["message"], error


def test_tools_need_a_parser(model, script):
    with running(scripted(model, script)) as plain:
        answer = plain.post("/v1/chat/completions", messages=HELLO, tools=[TOOL])
        assert answer.status_code == 400 and "--tool-call-parser" in answer.json()["error"]["message"]


def test_bodies_that_known_clients_send(client, script, stub):
    script += [CALL, "Fine.", "Yes.", "Yes."]
    message = client.chat.completions.create(model="s", messages=HELLO, tools=[TOOL]).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    for said in (message, message.model_dump()):  # the official client's object, and all its fields
        answer = client.chat.completions.create(model="s", messages=[*HELLO, said, result], tools=[TOOL])
        assert answer.choices[0].message.content in ("Fine.", "Yes.")
    body = {
        "model": "s", "messages": [{"role": "user", "content": "Hi", "type": "text"}], "max_tokens": 9, "n": 1,
        "max_completion_tokens": 9, "stop": [], "temperature": 0, "top_p": 1, "seed": 1234, "user": "me", "tools": None,
        "stream": False, "logprobs": False, "top_logprobs": None, "frequency_penalty": 0, "presence_penalty": 0,
        "response_format": {"type": "text"}, "store": False, "metadata": {}, "modalities": ["text"],
        "safety_identifier": "s", "prompt_cache_key": "k",
    }  # fmt: skip
    assert stub.post("/v1/chat/completions", **body).status_code == 200


def test_tokenize_and_back(server):
    tokens = server.post("/tokenize", prompt="the hand", return_token_strs=True).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"]) and tokens["max_model_len"] == 512
    assert server.post("/detokenize", tokens=tokens["tokens"]).json() == {"prompt": "the hand"}
    chat = server.post("/tokenize", messages=HELLO).json()["tokens"]
    assert server.post("/detokenize", tokens=chat).json() == {"prompt": "<u>the hand<a>"}
    for body in ({}, {"prompt": "a", "messages": HELLO}, {"prompt": "a", "x": 1}):
        assert server.post("/tokenize", **body).status_code == 400
    assert "[0, 300)" in server.post("/detokenize", tokens=[300]).json()["error"]["message"]

"""/v1/responses: items and their events, as the official client reads them."""

import json
import typing

import pytest
from openai.types.responses import Response, ResponseStreamEvent

from tests.serving.test_chat import CALL, expected

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
SAID = f"<think>\nLook it up.\n</think>\nOne moment. {CALL}"


def outline(response) -> list[tuple]:
    found = []
    for item in response.output:
        if item.type == "function_call":
            found.append((item.type, item.status, item.name, json.loads(item.arguments)))
        else:
            found.append((item.type, item.status, "".join(part.text for part in item.content)))
    return found


WANTED = [
    ("reasoning", "completed", "Look it up."),
    ("message", "completed", "One moment."),
    ("function_call", "completed", "weather", {"city": "Wien", "n": [1, 2]}),
]


def test_a_text_as_the_engine_gives_it(server):
    wanted = expected(server, "<s>in<u>the hand<a>")
    body = dict(input="the hand", instructions="in", temperature=0, max_output_tokens=16)
    answer = server.post("/v1/responses", **body).json()
    (item,) = answer["output"]
    assert item["content"][0]["text"] == wanted.outputs[0].text and item["role"] == "assistant"
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["usage"]["output_tokens"] == 16
    assert answer["usage"]["input_tokens"] == len(wanted.prompt_token_ids)


def test_items(client, script):
    script.append(SAID)
    response = client.responses.create(model="s", input="Hi", tools=[TOOL])
    assert outline(response) == WANTED and response.status == "completed" and response.output_text == "One moment."
    assert response.usage.output_tokens_details.reasoning_tokens > 0


def test_events_build_the_same_items(client, script):
    script.append(SAID)
    events = list(client.responses.create(model="s", input="Hi", tools=[TOOL], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert outline(events[-1].response) == WANTED
    texts = ["", "", ""]
    for event in events:
        if event.type.endswith(".delta"):
            texts[event.output_index] += event.delta
        if event.type.endswith("text.done"):
            assert event.text == texts[event.output_index]
        if event.type == "response.function_call_arguments.done":
            assert event.arguments == texts[event.output_index]
        if event.type == "response.output_item.done":
            assert event.item == events[-1].response.output[event.output_index]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    assert kinds.count("response.content_part.added") == kinds.count("response.content_part.done") == 2


EVENTS = {
    typing.get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in typing.get_args(typing.get_args(ResponseStreamEvent)[0])
}


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [TOOL]},
        {"tools": [TOOL], "max_output_tokens": 20, "parallel_tool_calls": False},
        {"tool_choice": "none", "tools": [TOOL], "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}},
    ],
)
def test_nothing_is_missing_that_the_client_declares(stub, script, body):
    """The client itself takes what comes, and leaves out attributes without a word."""
    script += [SAID, SAID]
    Response.model_validate(stub.post("/v1/responses", input="Hi", **body).json())
    lines = stub.post("/v1/responses", input="Hi", stream=True, **body).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    for event in events:
        EVENTS[event["type"]].model_validate(event)
    calls = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert all(call["name"] == TOOL["name"] for call in calls) and bool(calls) == (body == {"tools": [TOOL]})


def test_the_clients_helper_reads_the_stream(client, script):
    script.append("Yes.")
    with client.responses.stream(model="s", input=[{"role": "user", "content": "Hi"}]) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text == "Yes."


def test_what_was_said_goes_back_in(stub, script):
    script += [SAID, "Rain.", "Done."]
    first = stub.post("/v1/responses", input="Hi", tools=[TOOL]).json()
    call = first["output"][2]
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}, *first["output"]]
    items.append({"type": "function_call_output", "call_id": call["call_id"], "output": "wet"})
    answer = stub.post("/v1/responses", input=items, tools=[TOOL])
    assert answer.status_code == 200, answer.text
    assert answer.json()["output"][0]["content"][0]["text"] == "Rain."
    chat = stub.post("/v1/responses", input=items, tools=[TOOL], stream=True).text
    assert "response.completed" in chat
    rendered = "weather;<u>Hi<a>One moment.weather" + json.dumps({"city": "Wien", "n": [1, 2]}) + "<t>wet<a>"
    tokens = stub.services.llm.get_tokenizer().encode(rendered, add_special_tokens=False)
    assert answer.json()["usage"]["input_tokens"] == len(tokens)


def test_logprobs(server):
    body = dict(input="the", include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=5)
    part = server.post("/v1/responses", **body).json()["output"][0]["content"][0]
    assert len(part["logprobs"]) == 5 and all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])


REFUSED = [
    ({"input": "a", "previous_response_id": "x"}, "previous_response_id", "stored"),
    ({"input": "a", "store": True}, "store", "stored"),
    ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format", "needs name and schema"),
    ({"input": "a", "nonsense": 1}, "nonsense", "unknown field"),
    ({"input": []}, "input", "at least 1"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
    ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
    ({"input": "a", "max_output_tokens": 0}, "max_output_tokens", "at least 1"),
    ({"input": "a", "top_logprobs": 3}, "top_logprobs", "include"),
    ({"input": "the " * 400}, "input", "max_model_len"),
]


@pytest.mark.parametrize("body,field,limit", REFUSED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_name_the_field_and_the_limit(server, body, field, limit, stream):
    answer = server.http.post("/v1/responses", json={**body, "stream": stream})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field and limit in error["message"], error

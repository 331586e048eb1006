"""The official client beyond plain calls (tests/serving has those): its helpers, its asynchronous half, its errors."""

import asyncio
import json
from typing import Literal

import pytest

openai = pytest.importorskip("openai", reason="scripts/test_clients runs these")
from pydantic import BaseModel, ConfigDict, Field  # noqa: E402

from tests.clients.conftest import KEY  # noqa: E402


class Weather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Wien", "Graz"]
    degrees: int = Field(ge=0, le=40)


# No white space, of which a model with random weights writes a lot wherever JSON allows it: 2 ends a text, 3 is the
# first byte, and from 259 on there are longer tokens, the last of them with spaces (tests/engine/tiny.py).
PLAIN = {"allowed_token_ids": [2, *range(3 + ord("!"), 3 + 127), *range(259, 272)]}
# Calls have some of it in their syntax. At random it comes to an end.
LOOSE = {"temperature": 1.5, "seed": 1, "max_tokens": 400}
ARGUMENTS = {"city": "Wien", "degrees": 21}
CALL = f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': ARGUMENTS})}\n</tool_call>"
TOOL = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": Weather.model_json_schema()}}


def say(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def client(servers):
    return openai.OpenAI(base_url=f"{servers.parrot}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def tiny(servers):
    return openai.OpenAI(base_url=f"{servers.tiny}/v1", api_key=KEY, max_retries=0)


def test_the_stream_helper_gathers_a_chat(client):
    with client.chat.completions.stream(model="parrot", messages=say("Hello there"), n=1) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == "Hello there" and len(deltas) > 1


def test_the_stream_helper_gathers_calls(client):
    with client.chat.completions.stream(model="parrot", messages=say(CALL), tools=[TOOL]) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.done" in kinds and json.loads(call.function.arguments) == ARGUMENTS


@pytest.mark.usefixtures("grammars")
def test_parse_reads_json_of_a_schema(client, tiny):
    parsed = client.chat.completions.parse(
        model="parrot", messages=say(json.dumps(ARGUMENTS)), response_format=Weather
    ).choices[0]
    assert parsed.message.parsed == Weather(**ARGUMENTS)
    parsed = tiny.chat.completions.parse(
        model="tiny",
        messages=say("The weather?"),
        response_format=Weather,
        temperature=0,
        max_tokens=200,
        extra_body=PLAIN,
    ).choices[0]
    assert isinstance(parsed.message.parsed, Weather) and parsed.finish_reason == "stop"


@pytest.mark.usefixtures("grammars")
def test_parse_reads_strict_calls(client):
    tool = openai.pydantic_function_tool(Weather, name="weather")
    assert tool["function"]["strict"] is True
    (choice,) = client.chat.completions.parse(model="parrot", messages=say(CALL), tools=[tool]).choices
    assert choice.message.tool_calls[0].function.parsed_arguments == Weather(**ARGUMENTS)


@pytest.mark.usefixtures("grammars")
def test_responses_parse_reads_json_of_a_schema(tiny):
    answer = tiny.responses.parse(
        model="tiny", input="The weather?", text_format=Weather, temperature=0, max_output_tokens=200, extra_body=PLAIN
    )
    assert isinstance(answer.output_parsed, Weather)


def test_a_loop_of_calls_and_results(client):
    messages = say(CALL)
    message = client.chat.completions.create(model="parrot", messages=messages, tools=[TOOL]).choices[0].message
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}]
    answer = client.chat.completions.create(model="parrot", messages=messages, tools=[TOOL])
    assert answer.choices[0].message.content == "21 degrees" and answer.choices[0].finish_reason == "stop"


@pytest.mark.usefixtures("grammars")
def test_calls_that_the_model_has_to_make(tiny):
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        options = dict(messages=say("The weather?"), tools=[TOOL], tool_choice=choice, **LOOSE)
        answer = tiny.chat.completions.create(model="tiny", **options).choices[0].message
        Weather.model_validate_json(answer.tool_calls[0].function.arguments)


def test_many_at_once(servers):
    async def work():
        async with openai.AsyncOpenAI(base_url=f"{servers.parrot}/v1", api_key="any") as client:

            async def one(number):
                text = f"number {number}"
                if number % 2:
                    answer = await client.chat.completions.create(model="parrot", messages=say(text))
                    return answer.choices[0].message.content == text
                stream = await client.chat.completions.create(model="parrot", messages=say(text), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text

            return await asyncio.gather(*map(one, range(32)))

    assert all(asyncio.run(work()))


def test_models_and_raw_answers(tiny):
    assert [model.id for model in tiny.models.list()] == ["tiny"]
    raw = tiny.completions.with_raw_response.create(model="tiny", prompt="the", max_tokens=2)
    assert raw.headers["x-request-id"] == raw.parse()._request_id


def test_errors(client, tiny, servers):
    def create(client, **options):
        return client.chat.completions.create(**{"model": "tiny", "messages": say("the"), **options})

    with pytest.raises(openai.AuthenticationError):
        create(tiny.with_options(api_key="guess"))
    with pytest.raises(openai.NotFoundError):
        create(tiny, model="gpt-5")
    with pytest.raises(openai.BadRequestError) as caught:
        create(tiny, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        create(tiny, messages=say("the " * 1000))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.APITimeoutError):
        slow = openai.OpenAI(base_url=f"{servers.narrow}/v1", api_key="any", max_retries=0, timeout=0.3)
        create(slow, model="parrot", messages=say("x" * 100))


def test_a_full_server(servers, busy):
    client = openai.OpenAI(base_url=f"{servers.narrow}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="parrot", messages=say("a"))
    assert int(caught.value.response.headers["retry-after"]) >= 1
    patient = client.with_options(max_retries=8)
    assert patient.chat.completions.create(model="parrot", messages=say("a")).choices[0].message.content == "a"

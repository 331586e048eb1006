"""litellm over the server, under the providers that people name it by."""

import asyncio
import copy  # litellm changes the tools that it is given
import json

import pytest

litellm = pytest.importorskip("litellm", reason="scripts/test_clients runs these")

from tests.clients.conftest import KEY  # noqa: E402
from tests.clients.test_openai import ARGUMENTS, CALL, LOOSE, PLAIN, TOOL, Weather, say  # noqa: E402

PROVIDERS = ["openai", "hosted_vllm", "litellm_proxy"]


@pytest.fixture(scope="module", params=PROVIDERS)
def parrot(request, servers):
    return dict(model=f"{request.param}/parrot", api_base=f"{servers.parrot}/v1", api_key="any", num_retries=0)


@pytest.fixture(scope="module", params=PROVIDERS)
def tiny(request, servers):
    return dict(model=f"{request.param}/tiny", api_base=f"{servers.tiny}/v1", api_key=KEY, num_retries=0)


def test_a_chat(parrot):
    answer = litellm.completion(**parrot, messages=say("Hello there"), temperature=0.5, max_tokens=40)
    assert answer.choices[0].message.content == "Hello there" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


def test_a_stream_with_usage(parrot):
    chunks = list(
        litellm.completion(**parrot, messages=say("Hello there"), stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello there"
    assert chunks[-1].usage.completion_tokens > 0
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == "Hello there"


def test_async(parrot):
    async def work():
        answer = await litellm.acompletion(**parrot, messages=say("so"))
        stream = await litellm.acompletion(**parrot, messages=say("it"), stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return answer.choices[0].message.content, "".join(pieces)

    assert asyncio.run(work()) == ("so", "it")


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_tools(parrot, stream):
    messages = say(CALL)
    answer = litellm.completion(
        **parrot, messages=messages, tools=[copy.deepcopy(TOOL)], tool_choice="auto", stream=stream
    )
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=messages)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert json.loads(message.tool_calls[0].function.arguments) == ARGUMENTS
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "name": "weather", "content": "21 degrees"}
    answer = litellm.completion(**parrot, messages=[*messages, message, result], tools=[copy.deepcopy(TOOL)])
    assert answer.choices[0].message.content == "21 degrees"


def test_reasoning(parrot):
    message = litellm.completion(**parrot, messages=say("<think>hm</think>Yes.")).choices[0].message
    assert (message.reasoning_content, message.content) == ("hm", "Yes.")


@pytest.mark.usefixtures("grammars")
def test_structured_output(tiny):
    answer = litellm.completion(
        **tiny, messages=say("The weather?"), response_format=Weather, temperature=0, max_tokens=200, extra_body=PLAIN
    )
    Weather.model_validate_json(answer.choices[0].message.content)


@pytest.mark.usefixtures("grammars")
def test_forced_calls(tiny):
    if tiny["model"].startswith("hosted_vllm"):
        pytest.skip(
            "litellm takes additionalProperties out of the schema, and a model with random weights goes on and on"
        )
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = litellm.completion(
        **tiny,
        messages=say("The weather?"),
        tools=[copy.deepcopy(TOOL)],
        tool_choice=choice,
        **LOOSE,
    )
    Weather.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)


def test_own_parameters(tiny):
    answer = litellm.completion(
        **tiny, messages=say("the"), extra_body={"top_k": 3, "min_tokens": 4}, max_tokens=6, seed=2, n=2, stop=["\0"]
    )
    assert len(answer.choices) == 2 and answer.usage.completion_tokens >= 8


def test_completions(servers):
    options = dict(model="text-completion-openai/tiny", api_base=f"{servers.tiny}/v1", api_key=KEY, temperature=0)
    whole = litellm.text_completion(**options, prompt="the", max_tokens=8).choices[0].text
    stream = litellm.text_completion(**options, prompt="the", max_tokens=8, stream=True)
    assert whole and "".join(chunk.choices[0].text or "" for chunk in stream) == whole


def test_embeddings(tiny):
    answer = litellm.embedding(**tiny, input=["the hand", "the ring"])
    first, second = (entry["embedding"] for entry in answer.data)
    assert len(first) == len(second) > 8 and first != second and answer.usage.prompt_tokens > 0


def test_responses(servers):
    options = dict(model="openai/parrot", api_base=f"{servers.parrot}/v1", api_key="any")
    answer = litellm.responses(**options, input="Hello there")
    assert answer.output[0].content[0].text == "Hello there"
    events = list(litellm.responses(**options, input="Hello there", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello there"


def test_errors(tiny):
    for error, change in (
        (litellm.BadRequestError, {"temperature": -1.0}),
        (litellm.NotFoundError, {"model": tiny["model"].replace("tiny", "gpt-5")}),
        (litellm.AuthenticationError, {"api_key": "guess"}),
        (litellm.ContextWindowExceededError, {"messages": say("the " * 1000)}),
    ):
        with pytest.raises(error):
            litellm.completion(**{**tiny, "messages": say("the"), **change})


def test_a_full_server(servers, busy):
    options = dict(model="hosted_vllm/parrot", api_base=f"{servers.narrow}/v1", api_key="any", messages=say("a"))
    with pytest.raises(litellm.RateLimitError):
        litellm.completion(**options, num_retries=0, max_retries=0)
    answer = litellm.completion(**options, num_retries=8, retry_strategy="exponential_backoff_retry")
    assert answer.choices[0].message.content == "a"


def test_a_router_goes_to_another_server(servers, busy):
    def model(base):
        return {"model": "openai/parrot", "api_base": f"{base}/v1", "api_key": "any", "max_retries": 0}

    router = litellm.Router(
        model_list=[
            {"model_name": "first", "litellm_params": model(servers.narrow)},
            {"model_name": "second", "litellm_params": model(servers.parrot)},
        ],
        fallbacks=[{"first": ["second"]}],
        num_retries=0,
    )
    assert router.completion("first", messages=say("a")).choices[0].message.content == "a"

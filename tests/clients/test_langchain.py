"""langchain-openai over the server."""

import asyncio
import json

import pytest

langchain_openai = pytest.importorskip("langchain_openai", reason="scripts/test_clients runs these")
import openai  # noqa: E402
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage  # noqa: E402
from langchain_core.output_parsers import StrOutputParser  # noqa: E402
from langchain_core.prompts import ChatPromptTemplate  # noqa: E402
from langchain_core.tools import tool  # noqa: E402

from tests.clients.conftest import KEY  # noqa: E402
from tests.clients.test_openai import ARGUMENTS, CALL, LOOSE, PLAIN, Weather  # noqa: E402


@tool
def weather(city: str, degrees: int) -> str:
    """The weather of a city."""
    return f"{degrees} degrees in {city}"


@pytest.fixture(scope="module")
def parrot(servers):
    return langchain_openai.ChatOpenAI(model="parrot", base_url=f"{servers.parrot}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def tiny(servers):
    options = dict(base_url=f"{servers.tiny}/v1", api_key=KEY, max_retries=0)
    return langchain_openai.ChatOpenAI(model="tiny", temperature=0, max_tokens=250, extra_body=PLAIN, **options)


@pytest.fixture(scope="module")
def loose(servers):
    options = dict(base_url=f"{servers.tiny}/v1", api_key=KEY, max_retries=0)
    return langchain_openai.ChatOpenAI(model="tiny", **LOOSE, **options)


def test_a_chat(parrot):
    answer = parrot.invoke([SystemMessage("Be short."), HumanMessage("Hello there")])
    assert answer.content == "Hello there" and answer.response_metadata["finish_reason"] == "stop"
    usage = answer.usage_metadata
    assert usage["input_tokens"] > 0 and usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_a_stream_with_usage(parrot):
    chunks = list(parrot.stream("Hello there", stream_usage=True))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == "Hello there" and len(chunks) > 1 and whole.usage_metadata["output_tokens"] > 0


def test_chains_batches_and_async(parrot):
    chain = ChatPromptTemplate.from_messages([("system", "s"), ("human", "say {word}")]) | parrot | StrOutputParser()
    words = [{"word": word} for word in "abcdef"]
    assert chain.batch(words) == [f"say {word['word']}" for word in words]

    async def work():
        streamed = [piece async for piece in chain.astream({"word": "it"})]
        return "".join(streamed), await chain.ainvoke({"word": "so"})

    assert asyncio.run(work()) == ("say it", "say so")


def test_a_loop_of_tools(parrot):
    model = parrot.bind_tools([weather])
    messages = [HumanMessage(CALL)]
    messages.append(model.invoke(messages))
    (call,) = messages[-1].tool_calls
    assert (call["name"], call["args"]) == ("weather", ARGUMENTS)
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert model.invoke([*messages, result]).content == "21 degrees in Wien"


def test_calls_in_a_stream(parrot):
    whole = None
    for chunk in parrot.bind_tools([weather]).stream(CALL):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("weather", ARGUMENTS)]


@pytest.mark.usefixtures("grammars")
@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output(tiny, loose, method):
    model = loose if method == "function_calling" else tiny
    found = model.with_structured_output(Weather, method=method, include_raw=True).invoke("The weather?")
    assert isinstance(found["parsed"], Weather) and isinstance(found["raw"], AIMessage), found


@pytest.mark.usefixtures("grammars")
def test_json_mode(parrot):
    model = parrot.with_structured_output(Weather, method="json_mode")
    assert model.invoke(json.dumps(ARGUMENTS)) == Weather(**ARGUMENTS)


@pytest.mark.usefixtures("grammars")
def test_tools_that_have_to_be_called(loose):
    for choice in ("any", "Weather"):
        call, *_ = loose.bind_tools([Weather], tool_choice=choice).invoke("The weather?").tool_calls
        Weather(**call["args"])


def test_logprobs_and_parameters(tiny):
    model = tiny.bind(logprobs=True, top_logprobs=2, seed=3, stop=["\0"], presence_penalty=0.1, max_tokens=5)
    entries = model.invoke("the").response_metadata["logprobs"]["content"]
    assert len(entries) == 5 and all(len(entry["top_logprobs"]) == 2 for entry in entries)
    own = tiny.bind(extra_body={"top_k": 1, "repetition_penalty": 1.1})
    assert own.invoke("the").content == own.invoke("the").content


def test_responses(servers, parrot):
    model = langchain_openai.ChatOpenAI(
        model="parrot", base_url=f"{servers.parrot}/v1", api_key="any", use_responses_api=True
    )
    assert model.invoke("Hello there").text == "Hello there"
    assert "".join(chunk.text for chunk in model.stream("Hello there")) == "Hello there"
    caller = model.bind_tools([weather])
    messages = [HumanMessage(CALL)]
    messages.append(caller.invoke(messages))
    assert messages[-1].tool_calls[0]["args"] == ARGUMENTS
    messages.append(weather.invoke(messages[-1].tool_calls[0]))
    assert caller.invoke(messages).text == "21 degrees in Wien"


def test_completions(servers):
    model = langchain_openai.OpenAI(model="tiny", base_url=f"{servers.tiny}/v1", api_key=KEY, temperature=0)
    assert model.invoke("the") == "".join(model.stream("the"))


def test_embeddings(servers):
    model = langchain_openai.OpenAIEmbeddings(
        model="tiny", base_url=f"{servers.tiny}/v1", api_key=KEY, check_embedding_ctx_length=False
    )
    vectors = model.embed_documents(["the hand", "the ring", "the hand"])
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5) and vectors[0] != pytest.approx(vectors[1], abs=1e-3)
    assert model.embed_query("the hand") == pytest.approx(vectors[0], abs=1e-5)


def test_errors(tiny):
    with pytest.raises(openai.BadRequestError):
        tiny.invoke("the", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        tiny.invoke("the", model="gpt-5")
    with pytest.raises(openai.AuthenticationError):
        langchain_openai.ChatOpenAI(model="tiny", base_url=tiny.openai_api_base, api_key="guess").invoke("the")
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        tiny.invoke("the " * 1000)


def test_a_full_server(servers, busy):
    options = dict(model="parrot", base_url=f"{servers.narrow}/v1", api_key="any")
    with pytest.raises(openai.RateLimitError):
        langchain_openai.ChatOpenAI(**options, max_retries=0).invoke("a")
    assert langchain_openai.ChatOpenAI(**options, max_retries=8).invoke("a").content == "a"

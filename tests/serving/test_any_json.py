"""Whatever JSON is sent: an answer in time, and none that says the server is at fault."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from jaxllm.serving.protocol.chat import ChatRequest
from jaxllm.serving.protocol.completions import CompletionRequest
from jaxllm.serving.protocol.responses import ResponsesRequest

SETTINGS = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
SANE = {
    "max_tokens": st.integers(0, 5), "n": st.integers(0, 4), "temperature": st.floats(0, 2), "seed": st.integers(),
    "stream": st.booleans(), "echo": st.booleans(), "logprobs": st.integers(0, 3) | st.booleans(),
    "stop": st.text(max_size=2) | st.lists(st.text(max_size=2), max_size=3), "top_k": st.integers(-2, 10),
    "logit_bias": st.dictionaries(st.integers(-2, 400).map(str), st.floats(-101, 101), max_size=3),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "prompt_logprobs": st.integers(-1, 3), "bad_words": st.lists(st.text(max_size=3), max_size=3),
    "truncate_prompt_tokens": st.integers(-2, 20), "min_tokens": st.integers(0, 6), "allowed_token_ids": st.lists(
        st.integers(-1, 310), max_size=4), "stop_token_ids": st.lists(st.integers(-1, 310), max_size=4),
    "repetition_penalty": st.floats(-1, 3), "top_logprobs": st.integers(-1, 3), "return_token_ids": st.booleans(),
}  # fmt: skip
TEXT = st.text(max_size=20)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT | st.none() | JSON},
    optional={"name": TEXT, "tool_calls": JSON, "x": JSON},
)
PROMPT = TEXT | st.lists(TEXT, max_size=3) | st.lists(st.integers(-1, 301), max_size=5) | JSON
TOOLS = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function"), "function": st.fixed_dictionaries({"name": st.just("f"), "parameters": JSON})}
    ),
    max_size=2,
)


LIMITS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}


def bodies(model, required: dict) -> st.SearchStrategy:
    """Objects with the endpoint's own fields, mostly of sane values."""
    fields = sorted({*model.model_fields, *SANE.keys() & model.model_fields.keys()} - {*LIMITS, *required})
    optional = {name: SANE.get(name, JSON) for name in fields}
    few = st.sets(st.sampled_from(fields), max_size=5).flatmap(
        lambda names: st.fixed_dictionaries(
            required | {"max_tokens": st.integers(0, 5)} | {n: optional[n] for n in names}
        )
    )
    return few | st.dictionaries(st.sampled_from(sorted({*fields, *required})), JSON, max_size=5) | JSON


def check(server, path: str, body: object) -> None:
    try:
        text = json.dumps(body).encode()
    except ValueError:
        return
    answer = server.http.post(path, content=text, headers={"content-type": "application/json"}, timeout=20)
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        lines = [line for line in answer.text.split("\n") if line and not line.startswith("event: ")]
        assert lines[-1] == "data: [DONE]" or path == "/v1/responses"
        for line in lines[: None if path == "/v1/responses" else -1]:
            event = json.loads(line.removeprefix("data: "))
            assert "choices" in event or "sequence_number" in event or event["error"]["code"] == "invalid_value"
    else:
        json.loads(answer.text)


@SETTINGS
@given(body=bodies(CompletionRequest, {"prompt": PROMPT, "max_tokens": st.integers(0, 5)}))
def test_completions(server, body):
    check(server, "/v1/completions", body)


@SETTINGS
@given(
    body=bodies(
        ChatRequest,
        {
            "messages": st.lists(MESSAGE, min_size=1, max_size=3),
            "tools": TOOLS | st.none(),
            "max_tokens": st.integers(0, 5),
        },
    ),
)
def test_chats(server, body):
    check(server, "/v1/chat/completions", body)


INPUT = TEXT | JSON | st.lists(MESSAGE | st.fixed_dictionaries(
    {"type": st.sampled_from(["function_call", "function_call_output", "reasoning", "message"])},
    optional={"call_id": TEXT, "name": TEXT, "arguments": TEXT, "output": TEXT, "content": JSON, "role": TEXT}),
    max_size=3,
)  # fmt: skip


@SETTINGS
@given(body=bodies(ResponsesRequest, {"input": INPUT, "max_output_tokens": st.integers(0, 5)}))
def test_responses(server, body):
    check(server, "/v1/responses", body)


@SETTINGS
@given(path=st.sampled_from(["/tokenize", "/detokenize"]), body=JSON | st.fixed_dictionaries(
    {}, optional={"prompt": TEXT, "messages": st.lists(MESSAGE, max_size=2), "tokens": st.lists(st.integers(-2, 310)),
                  "chat_template_kwargs": JSON, "return_token_strs": st.booleans()}))  # fmt: skip
def test_tokenize(server, path, body):
    check(server, path, body)


def send_made_cases(server, count: int, mode: GenerationMode) -> int:
    """Sends so many cases to each endpoint of /openapi.json, and returns how many it sent."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 10
    sent = []
    for operation in operations:

        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case):
            if isinstance(case.body, dict):
                for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n"):
                    if isinstance(case.body.get(name), int):
                        case.body[name] = min(case.body[name], 3)
            answer = case.call(timeout=20)
            assert answer.status_code < 500, answer.text
            sent.append(answer.status_code)

        try:
            send()
        except Unsatisfiable:  # an endpoint without anything that could be wrong
            assert mode is GenerationMode.NEGATIVE
    return len(sent)


def test_what_the_schema_allows(server):
    """Requests made from /openapi.json, for every endpoint."""
    send_made_cases(server, 5, GenerationMode.POSITIVE)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_thousands_of_what_the_schema_allows_and_forbids(server, mode):
    count = send_made_cases(server, 400, mode)
    print(f"{count} cases")
    assert count >= 2000
    assert server.http.get("/health").status_code == 200
    assert server.stats()["running"] == server.call(lambda: server.services.admission.samples) == 0

"""/v1/completions: what comes back is what the engine gives, whole and in pieces."""

import itertools
import json

import openai
import pytest

from jaxllm import SamplingParams

PROMPT = "the hand and the ring"


def expected(server, prompt, **params):
    """The engine's own output, greedy unless asked otherwise."""
    wanted = SamplingParams(**{"temperature": 0, "max_tokens": 16, **params})
    return server.call(server.services.llm.complete, prompt, wanted)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_a_text_as_the_engine_gives_it(server, client):
    output = expected(server, PROMPT)
    answer = client.completions.create(model="tiny", prompt=PROMPT, temperature=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (output.outputs[0].text, output.outputs[0].finish_reason)
    assert answer.usage.prompt_tokens == len(output.prompt_token_ids)
    assert answer.usage.completion_tokens == 16 and answer.object == "text_completion" and answer.id.startswith("cmpl-")
    by_ids = client.completions.create(model="alias", prompt=output.prompt_token_ids, temperature=0)
    assert by_ids.choices[0].text == choice.text and by_ids.model == "alias"


def test_streams_join_to_the_whole(server, client):
    output = expected(server, PROMPT, max_tokens=40)
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=PROMPT,
            temperature=0,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == output.outputs[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 10


def test_prompts_times_samples(server):
    prompts = [PROMPT, "in", "an ant"]
    body = dict(prompt=prompts, n=3, seed=7, temperature=1.0, max_tokens=8)
    whole = server.post("/v1/completions", **body).json()
    assert [choice["index"] for choice in whole["choices"]] == list(range(9))
    for position, prompt in enumerate(prompts):
        output = expected(server, prompt, n=3, seed=7, temperature=1.0, max_tokens=8)
        texts = [choice["text"] for choice in whole["choices"][3 * position : 3 * position + 3]]
        assert texts == [sample.text for sample in output.outputs]
    events = server.events("/v1/completions", **body)
    for index, choice in enumerate(whole["choices"]):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_and_stop_tokens(server, stream):
    output = expected(server, PROMPT, max_tokens=30).outputs[0]
    stop = output.text[6:8]
    body = dict(prompt=PROMPT, temperature=0, max_tokens=30)
    for extra, reason in (
        ({"stop": stop}, stop),
        ({"stop": ["\0\0", stop], "include_stop_str_in_output": True}, stop),
        ({"stop_token_ids": [output.token_ids[5]]}, output.token_ids[5]),
    ):
        if stream:
            events = server.events("/v1/completions", **body, **extra)
            choice = events[-1]["choices"][0]
            choice["text"] = "".join(event["choices"][0]["text"] for event in events)
        else:
            choice = server.post("/v1/completions", **body, **extra).json()["choices"][0]
        assert choice["finish_reason"] == "stop" and choice["stop_reason"] == reason
        if "stop" in extra:
            kept = len(stop) if "include_stop_str_in_output" in extra else 0
            assert choice["text"] == output.text[: output.text.index(stop) + kept]


def test_echo_with_logprobs_scores_the_prompt(server):
    output = expected(server, PROMPT, logprobs=2, prompt_logprobs=2, max_tokens=3)
    body = dict(prompt=PROMPT, echo=True, logprobs=2, temperature=0)
    choice = server.post("/v1/completions", **body, max_tokens=3).json()["choices"][0]
    assert choice["text"] == PROMPT + output.outputs[0].text
    tokens = output.prompt_token_ids + output.outputs[0].token_ids
    positions = output.prompt_logprobs + output.outputs[0].logprobs
    wanted = [None if position is None else position[token].logprob for token, position in zip(tokens, positions)]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted, abs=1e-4)
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["top_logprobs"]) == len(tokens)
    lengths = [len(token) for token in choice["logprobs"]["tokens"]]
    assert choice["logprobs"]["text_offset"] == [0, *itertools.accumulate(lengths[:-1])]
    scored = server.post("/v1/completions", **body, max_tokens=0).json()
    assert scored["choices"][0]["text"] == PROMPT and scored["choices"][0]["finish_reason"] == "length"
    of_prompt = len(output.prompt_token_ids)
    assert scored["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(wanted[:of_prompt], abs=1e-4)
    assert scored["usage"]["completion_tokens"] == 0


def test_streamed_echo_of_nothing_more_counts_no_tokens(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = dict(prompt=PROMPT, echo=True, max_tokens=0, n=2, stream_options=options)
    events = server.events("/v1/completions", **body)
    assert [event["usage"]["completion_tokens"] for event in events] == [0] * len(events)
    assert [event["choices"][0]["text"] for event in events if event["choices"]] == [PROMPT, PROMPT, "", ""]


def test_streamed_echo_begins_with_the_prompt(server):
    events = server.events("/v1/completions", prompt=["the", "in"], echo=True, max_tokens=2, n=2)
    for index in range(4):
        own = [event["choices"][0]["text"] for event in events if event["choices"][0]["index"] == index]
        assert own[0] == ["the", "in"][index // 2]


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_and_logprobs_of_every_token(server, stream):
    output = expected(server, PROMPT, max_tokens=12, logprobs=1)
    body = dict(prompt=PROMPT, temperature=0, max_tokens=12, logprobs=1, return_token_ids=True)
    body["return_tokens_as_token_ids"] = True
    if stream:
        choices = [event["choices"][0] for event in server.events("/v1/completions", **body)]
        assert choices[0]["prompt_token_ids"] == output.prompt_token_ids
    else:
        choices = [server.post("/v1/completions", **body).json()["choices"][0]]
    ids = [token for choice in choices for token in choice["token_ids"]]
    named = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert ids == output.outputs[0].token_ids and named == [f"token_id:{token}" for token in ids]
    logprobs = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
    assert logprobs == pytest.approx([entry[token].logprob for token, entry in zip(ids, output.outputs[0].logprobs)])


def test_sampling_fields_reach_the_engine(server):
    fields = dict(
        top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3, seed=3,
        min_tokens=6, ignore_eos=True, allowed_token_ids=list(range(3, 200)), bad_words=["e"], temperature=1.3,
    )  # fmt: skip
    output = expected(server, PROMPT, max_tokens=20, logit_bias={50: 5.0}, **fields)
    body = dict(prompt=PROMPT, max_tokens=20, logit_bias={"50": 5.0}, return_token_ids=True, **fields)
    choice = server.post("/v1/completions", **body).json()["choices"][0]
    assert choice["token_ids"] == output.outputs[0].token_ids


def test_truncation_keeps_the_prompts_end(server):
    ids = list(range(10, 60))
    whole = server.post("/v1/completions", prompt=ids[-7:], temperature=0, max_tokens=4).json()
    cut = server.post("/v1/completions", prompt=ids, truncate_prompt_tokens=7, temperature=0, max_tokens=4).json()
    assert cut["usage"]["prompt_tokens"] == 7 and cut["choices"][0]["text"] == whole["choices"][0]["text"]
    most = server.post("/v1/completions", prompt=[5] * 900, truncate_prompt_tokens=-1, max_tokens=4).json()
    assert most["usage"]["prompt_tokens"] == 508


def test_usage_counts_what_the_prefix_cache_had(server):
    ids = [100 + i % 90 for i in range(70)]
    first = server.post("/v1/completions", prompt=ids, max_tokens=1, cache_salt="one").json()["usage"]
    again = server.post("/v1/completions", prompt=ids, max_tokens=1, cache_salt="one").json()["usage"]
    other = server.post("/v1/completions", prompt=ids, max_tokens=1, cache_salt="two").json()["usage"]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (first, again, other)]
    assert cached == [0, 64, 0]
    events = server.events(
        "/v1/completions",
        prompt=ids,
        max_tokens=3,
        stream_options={"continuous_usage_stats": True, "include_usage": True},
    )
    assert [event["usage"]["completion_tokens"] for event in events][-2:] == [3, 3]


REFUSED = [
    ({"prompt": PROMPT, "fool": 1}, 400, "fool", "unknown field"),
    ({"prompt": PROMPT, "stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "unknown field"),
    ({"prompt": PROMPT, "suffix": "end"}, 400, "suffix", "fill in the middle"),
    ({"prompt": PROMPT, "best_of": 2}, 400, "best_of", "use n"),
    ({"prompt": PROMPT, "guided_json": {}}, 400, "guided_json", "structured_outputs={'json'"),
    ({"prompt": PROMPT, "model": "gpt"}, 404, "model", "tiny"),
    ({"prompt": PROMPT, "max_tokens": 0}, 400, "max_tokens", "at least 1"),
    ({"prompt": PROMPT, "temperature": "hot"}, 400, "temperature", "number"),
    ({"prompt": PROMPT, "temperature": -1}, 400, "temperature", "at least 0"),
    ({"prompt": PROMPT, "n": 129}, 400, "n", "128"),
    ({"prompt": PROMPT, "logprobs": 21}, 400, "logprobs", "20"),
    ({"prompt": PROMPT, "logit_bias": {"a": 1}}, 400, "logit_bias", "token ids"),
    ({"prompt": PROMPT, "logit_bias": {"300": 1}}, 400, "logit_bias", "300"),
    ({"prompt": PROMPT, "logit_bias": {"9" * 25: 1}}, 400, "logit_bias", "token ids"),
    ({"prompt": PROMPT, "priority": 1}, 400, "priority", "scheduling_policy"),
    ({"prompt": PROMPT, "stream_options": {"include_usage": True}}, 400, "stream_options", "stream=true"),
    ({"prompt": PROMPT, "stream": True, "prompt_logprobs": 1}, 400, "prompt_logprobs", "streams"),
    ({"prompt": [5] * 512}, 400, "prompt", "max_model_len"),
    ({"prompt": ["a", [5] * 512], "stream": True}, 400, "prompt", "list"),
    ({"prompt": [[5], [5] * 512], "stream": True}, 400, "prompt", "max_model_len"),
    ({"prompt": []}, 400, "prompt", "list"),
    ({"prompt": ["a"] * 1025}, 400, "prompt", "1024"),
    ({"prompt": ["a"] * 10, "n": 128}, 400, "prompt", "1024"),
    ({}, 400, "prompt", "required"),
    ([], 400, None, "dictionary"),
]


@pytest.mark.parametrize("body,status,field,limit", REFUSED, ids=lambda value: str(value)[:40])
def test_refusals_name_the_field_and_the_limit(server, body, status, field, limit):
    answer = server.http.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == field and limit in error["message"]
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_what_is_no_json_is_refused(server):
    for text in (
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"prompt": ' + b"[" * 50_000,
        b'{"prompt": 1' + b"0" * 5000 + b"}",
    ):
        answer = server.http.post("/v1/completions", content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    for kind in ("text/plain", "text/json", "application/jsonp", "application", ""):
        answer = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]
    for kind in ("Application/JSON; charset=utf-8", "application/vnd.api+json"):
        answer = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert answer.status_code == 200
    answer = server.http.get("/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    text = json.dumps({"prompt": "\ud800"})
    answer = server.http.post("/v1/completions", content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "surrogate" in answer.json()["error"]["message"]


def test_the_clients_errors_are_openais(server, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=PROMPT, extra_body={"min_p": 3})
    assert caught.value.param == "min_p" and caught.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]

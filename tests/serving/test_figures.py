"""The engine's figures at the server, and its words for what it has to give up."""

import json
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.harness import running, scripted


@pytest.fixture(scope="module")
def fresh(model):
    with running(model, served_model_name=["m"]) as found:
        yield found


def histogram(server, name: str) -> tuple[list[float], float, float]:
    """Its cumulative counts, their last and the sum of what was observed."""
    families = {family.name: family for family in text_string_to_metric_families(server.http.get("/metrics").text)}
    samples = families[f"jaxllm:{name}"].samples
    counts = [item.value for item in samples if item.name.endswith("_bucket")]
    values = {item.name.rpartition("_")[2]: item.value for item in samples if not item.name.endswith("_bucket")}
    return counts, values["count"], values["sum"]


def test_steps_and_queue_times_are_counted(fresh):
    prompt, answers = list(range(40, 80)), 5
    for index in range(answers):
        body = fresh.post("/v1/completions", prompt=[index + 5, *prompt], max_tokens=7, ignore_eos=True)
        assert body.status_code == 200
    stats = fresh.stats()
    counts, count, tokens = histogram(fresh, "engine_step_tokens")
    assert counts == sorted(counts) and counts[-1] == count == stats["steps"]
    # Each prompt, and each output token but the last, is computed once.
    assert tokens == stats["scheduled_tokens"] >= answers * (len(prompt) + 1 + 6)
    counts, count, seconds = histogram(fresh, "engine_step_seconds")
    assert counts[-1] == count == stats["steps"] and 0 < seconds < 60
    counts, count, waited = histogram(fresh, "request_queue_time_seconds")
    assert counts[-1] == count == answers and 0 <= waited < 60


def test_the_engines_reason_reaches_the_client(fresh):
    (word,) = fresh.services.llm.get_tokenizer().encode("a", add_special_tokens=False)
    body = {"prompt": [5, 6], "allowed_token_ids": [word], "bad_words": ["a"], "temperature": 0}  # nothing is left
    failed = fresh.post("/v1/completions", **body)
    error = failed.json()["error"]
    assert failed.status_code == 500 and error["code"] == "generation_error" and "forbidden" in error["message"]
    with fresh.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert json.loads(lines[-2][6:])["error"] == error and lines[-1] == "data: [DONE]"
    # One of two prompts is enough, and nothing stays behind.
    assert fresh.post("/v1/completions", **body | {"prompt": [[5, 6], [7]], "max_tokens": 300}).status_code == 500
    assert fresh.post("/v1/completions", prompt=[5, 6], max_tokens=2).status_code == 200
    stats = fresh.stats()
    assert stats["running"] == stats["waiting"] == stats["cache_usage"] == 0


def test_a_full_server_refuses_without_reading(model):
    """A body that is not even JSON gets 429 while the queue is full, and 400 otherwise."""
    engine = scripted(model, ["the hand and the ring " * 40] * 2, max_num_seqs=1, steps_per_second=50)
    with running(engine, max_queued_requests=0) as server:
        broken = dict(content=b"{", headers={"content-type": "application/json"})
        assert server.http.post("/v1/completions", **broken).status_code == 400
        with server.http.stream(
            "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 200, "stream": True}
        ) as it:
            lines = it.iter_lines()  # dropping it would close the stream
            next(lines)
            for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"):
                refused = server.http.post(path, **broken)
                assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full", path
                assert int(refused.headers["retry-after"]) >= 1
            assert server.http.post("/tokenize", json={"prompt": "a"}).status_code == 200
        for _ in range(200):
            if not server.call(lambda: server.services.admission.samples):
                break
            time.sleep(0.02)
        assert server.http.post("/v1/completions", **broken).status_code == 400

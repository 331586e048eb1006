"""Keys, limits, logs, metrics and the command itself."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from jaxllm.cli.app import app
from jaxllm.engine.figures import StepFigures
from jaxllm.errors import ConfigError
from jaxllm.serving.auth import ApiKeys, load_keys
from jaxllm.serving.config import ServerConfig
from jaxllm.serving.log import JsonFormatter
from jaxllm.serving.server import bind
from tests.serving.harness import running, scripted

KEY, OTHER = "sk-a-secret-of-its-own", "sk-another-secret-0123"


@pytest.fixture(scope="module")
def locked(model):
    with running(model, api_key=[KEY, OTHER], max_body_bytes=4096, log_level="info") as found:
        yield found


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_route_but_health_wants_a_key(locked):
    for path in ("/health", "/ready"):
        assert locked.http.get(path).status_code == 200
    paths = [
        "/v1/models",
        "/v1/models/x",
        "/metrics",
        "/version",
        "/openapi.json",
        "/tokenize",
        "/nowhere",
        "/v1//models",
    ]
    for path in [*paths, "/v1/completions", "/v1/chat/completions", "/health/", "/HEALTH"]:
        for headers in (
            {},
            {"authorization": "Bearer"},
            bearer(KEY[:-1]),
            bearer(KEY + "x"),
            {"authorization": KEY},
            {"x-api-key": "no"},
        ):
            refused = locked.http.request("POST" if headers else "GET", path, headers=headers)
            assert refused.status_code == 401, (path, headers)
        assert refused.json()["error"]["type"] == "authentication_error"
        assert refused.headers["www-authenticate"] == "Bearer"
    for headers in (bearer(KEY), bearer(OTHER), {"x-api-key": KEY}, {"authorization": f"bearer {OTHER}"}):
        assert locked.http.get("/v1/models", headers=headers).status_code == 200


def test_keys_share_no_prefix_cache(locked):
    body = {"prompt": list(range(50, 120)), "max_tokens": 1}

    def cached(key: str, **extra) -> int:
        answer = locked.http.post("/v1/completions", json=body | extra, headers=bearer(key)).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(KEY), cached(KEY), cached(OTHER), cached(OTHER)] == [0, 64, 0, 64]
    for key in locked.services.keys._keys:  # a client cannot name another's salt
        assert cached(OTHER, cache_salt=key.salt) == cached(OTHER, cache_salt=f"{key.salt}:") == 0


def test_secrets_and_texts_are_not_logged(locked, caplog, capfd):
    with caplog.at_level(logging.DEBUG, logger="jaxllm"):
        text = "the secret conversation"
        answer = locked.http.post(
            "/v1/completions?key=in-the-query", json={"prompt": text, "max_tokens": 2}, headers=bearer(KEY)
        )
        locked.http.get("/v1/models", headers=bearer("sk-wrong-secret"))
        for _ in range(100):
            if len(caplog.records) >= 2:
                break
            time.sleep(0.01)
    lines = [JsonFormatter().format(record) for record in caplog.records]
    captured = capfd.readouterr()
    everything = "\n".join(lines) + captured.out + captured.err
    for secret in (KEY, OTHER, "sk-wrong-secret", text, "in-the-query"):
        assert secret not in everything
    mine = [json.loads(line) for line in lines if answer.headers["x-request-id"] in line]
    assert [line["path"] for line in mine] == ["/v1/completions"] and mine[0]["status"] == 200
    assert (
        mine[0]["prompt_tokens"] and mine[0]["output_tokens"] == 2 and re.fullmatch("key-[0-9a-f]{8}", mine[0]["key"])
    )
    assert mine[0]["finish_reasons"] == ["length"] and 0 < mine[0]["ttft_s"] <= mine[0]["seconds"]
    assert KEY not in repr(locked.services.keys.__dict__)


def test_request_ids(locked):
    given = locked.http.get("/health", headers={"x-request-id": "my-id.1"})
    assert given.headers["x-request-id"] == "my-id.1"
    for bad in ("", "a b", "x" * 129, 'a"b'):
        assert locked.http.get("/health", headers={"x-request-id": bad}).headers["x-request-id"] != bad
    answer = locked.http.post(
        "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={**bearer(KEY), "x-request-id": "mine"}
    )
    assert answer.json()["id"] == "cmpl-mine" and answer.headers["x-request-id"] == "mine"
    # the same id twice at once is nobody's fault
    body = {"prompt": ["a", "b"], "max_tokens": 2, "request_id": "mine"}
    assert locked.http.post("/v1/completions", json=body, headers=bearer(KEY)).json()["id"] == "cmpl-mine"


def test_large_bodies_are_refused(locked):
    for body in ({"prompt": "a" * 5000}, {"prompt": [1] * 5000}):
        refused = locked.http.post("/v1/completions", json=body, headers=bearer(KEY))
        assert refused.status_code == 413 and "4096" in refused.json()["error"]["message"]
    pieces = (b"x" * 1000 for _ in range(50))  # without a content-length
    assert locked.http.post("/v1/completions", content=pieces, headers=bearer(KEY)).status_code == 413


def test_keys_come_from_options_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file\n\n  second \n")
    monkeypatch.setenv("JAXLLM_API_KEY", "from-env")
    keys = load_keys(ServerConfig(api_key=["from-option"], api_key_file=str(file)))
    for key in ("from-file", "second", "from-env", "from-option"):
        assert keys.find({b"authorization": f"Bearer {key}".encode()}) is not None
    assert keys.find({b"authorization": b"Bearer # ours"}) is None
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="holds no key"):
        load_keys(ServerConfig(api_key_file=str(file)))
    assert not ApiKeys([]).needed


@pytest.mark.parametrize(
    "options,words",
    [
        ({"port": 70000}, "65535"),
        ({"max_n": 0}, "max_n"),
        ({"request_timeout": 0}, "above 0"),
        ({"api_key": ["a key of mine\n"]}, "printable"),
        ({"chat_template": "/nowhere"}, "no such file"),
        ({"enable_auto_tool_choice": True}, "tool_call_parser"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        ServerConfig(**options)
    assert "mine" not in str(caught.value)


def test_pages_of_other_origins(model):
    ask = {"origin": "http://page", "access-control-request-method": "POST"}
    with running(scripted(model, []), allowed_origins=["http://page"], api_key=[KEY]) as server:
        allowed = server.http.options("/v1/completions", headers=ask)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "http://page"
        refused = server.http.get("/v1/models", headers={"origin": "http://page"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "http://page"
        other = server.http.options("/v1/completions", headers={**ask, "origin": "http://else"})
        assert "access-control-allow-origin" not in other.headers
    with running(scripted(model, [])) as server:
        assert "access-control-allow-origin" not in server.http.get("/v1/models", headers=ask).headers


def test_small_writes_go_out_at_once():
    with bind(ServerConfig(port=0)) as bound:
        assert bound.proto == socket.IPPROTO_TCP  # without it asyncio leaves Nagle's algorithm on


def test_metrics(model):
    engine = scripted(model, ["the hand and the ring"] * 9)
    with running(engine, served_model_name=["m"]) as server:
        for n in (1, 3):
            server.post("/v1/completions", prompt="a ring", n=n, max_tokens=8)
        server.post("/v1/completions", prompt="a", wrong=1)
        text = server.http.get("/metrics").text
        families = {family.name: family for family in text_string_to_metric_families(text)}

        def value(name: str, sample: str = "", **labels: str) -> float:
            found = [
                item.value
                for item in families[f"jaxllm:{name}"].samples
                if item.name == f"jaxllm:{name}{sample}" and labels.items() <= item.labels.items()
            ]
            assert found, (name, families[f"jaxllm:{name}"].samples)
            return sum(found)

        tokens = value("generation_tokens", "_total")
        assert tokens == 32 and value("request_success", "_total", finished_reason="length") == 4
        assert value("prompt_tokens", "_total") == 2 * len(server.services.llm.get_tokenizer().encode("a ring"))
        assert value("time_to_first_token_seconds", "_count") == value("e2e_request_latency_seconds", "_count") == 4
        assert value("inter_token_latency_seconds", "_count") <= tokens - 4
        assert value("request_time_per_output_token_seconds", "_count") == 4
        assert value("http_requests", "_total", path="/v1/completions", status="400") == 1
        assert value("num_requests_running") == 0 and value("server_samples") == 0
        assert all(sample.labels["model_name"] == "m" for family in families.values() for sample in family.samples)


def test_the_dashboards_queries_name_metrics_that_exist(model, root):
    with running(scripted(model, ["a"])) as server:
        server.post("/v1/completions", prompt="a", max_tokens=1)
        text = server.http.get("/metrics").text
        stats = {"prefix_queried_tokens", "prefix_hit_tokens", "scheduled_tokens", "padded_tokens"}
        server.services.heartbeat.stats |= dict.fromkeys(stats, 0)  # of what the stub does not tell
        server.services.heartbeat.stats["step_seconds"] = StepFigures().seconds.json()
        text += server.call(generate_latest, server.services.metrics.registry).decode()
    dashboard = json.loads((root / "jaxllm" / "serving" / "dashboards" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    named = {name for query in queries for name in re.findall(r"jaxllm:\w+", query)}
    assert len(named) > 15
    assert not [name for name in named if f"{name}{{" not in text]


@pytest.fixture(scope="module")
def command(model):
    """`jaxllm serve` as a process: (process, url, its lines on stderr)."""
    code = "from jaxllm.cli import main; main()"
    sizes = ["--token-rungs", "4,32,128", "--max-num-batched-tokens", "128", "--page-size", "8", "--max-num-seqs", "32"]
    flags = ["--port", "0", "--served-model-name", "tiny", "--no-warm-up", *sizes]
    environment = {**os.environ, "JAXLLM_API_KEY": KEY}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", model, *flags], stderr=subprocess.PIPE, text=True, env=environment
    )
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
    url = None
    for _ in range(600):
        found = re.findall(r'"address":"(http://[^"]+)"', "".join(list(lines)))
        if found:
            url = found[0]
            break
        assert process.poll() is None, "".join(lines)
        time.sleep(0.1)
    assert url is not None, "".join(lines)
    yield process, url, lines
    process.kill()
    process.wait()


def test_the_command_serves_and_drains(command):
    process, url, lines = command
    with httpx2.Client(base_url=url, headers=bearer(KEY), timeout=60) as client:
        for _ in range(100):
            try:
                assert client.get("/health").status_code == 200
                break
            except httpx2.TransportError:
                time.sleep(0.1)
        body = {"prompt": "the hand", "max_tokens": 50, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            iterator = answer.iter_lines()
            next(iterator)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in iterator if line]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert process.wait(30) == 0
    text = "".join(lines)
    assert KEY not in text and '"message":"draining"' in text
    assert all(json.loads(line)["level"] in ("info", "warning") for line in lines if line.startswith("{"))


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--port", "99999"], "port=99999"),
        (["--tool-call-parser", "none-such"], "hermes"),
        (["--reasoning-parser", "none-such"], "qwen3"),
        (["--api-key", "a b\t"], "api_key=…"),
        (["--host", "256.0.0.1"], "host='256.0.0.1'"),
    ],
)
def test_the_command_refuses_before_the_engine_starts(flags, words, model, monkeypatch):
    monkeypatch.setattr("jaxllm.serving.log.set_up_logging", lambda *_: None)  # the tests' own is to stay
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(app, ["serve", model, *flags], catch_exceptions=False)
    assert words in str(caught.value)

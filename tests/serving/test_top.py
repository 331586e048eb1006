"""`jaxllm top` and the reading of /metrics under it."""

import random

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from typer.testing import CliRunner

from jaxllm.cli.app import app
from jaxllm.errors import ConfigError
from jaxllm.serving.scraped import Between, parse
from tests.serving.harness import running, scripted


def test_quantiles_are_those_of_what_came_between():
    registry, draw = CollectorRegistry(), random.Random(0)
    bounds = [index / 100 for index in range(1, 101)]
    histogram = Histogram("jaxllm:wait", "", ["model_name"], registry=registry, buckets=bounds)
    for _ in range(500):  # before: to be left out
        histogram.labels("a").observe(5.0)
    first = parse(generate_latest(registry).decode(), 0.0)
    assert Between(first, first).quantile("wait", 0.5) is None
    values = [draw.betavariate(2, 5) for _ in range(2000)]
    for index, value in enumerate(values):
        histogram.labels("ab"[index % 2]).observe(value)
    seen = Between(first, parse(generate_latest(registry).decode(), 4.0))
    for q in (0.01, 0.5, 0.9, 0.99):
        assert abs(seen.quantile("wait", q) - sorted(values)[int(q * 2000)]) < 0.011
    assert seen.rate("wait_count") == 500 and seen.rise("wait_sum") == pytest.approx(sum(values))
    assert seen.quantile("none", 0.5) is None and seen.share("none_total", "none_total") is None
    # A server that has begun anew counts from nothing.
    assert Between(seen.last, first).rise("wait_count") == 500
    assert Between(seen.last, first).quantile("wait", 0.5) == 1.0  # beyond the last bound


def test_a_server_is_shown(model):
    with running(scripted(model, ["the hand and the ring"] * 3), api_key=["sk-top"]) as server:
        headers = {"authorization": "Bearer sk-top"}
        for _ in range(3):
            server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 5}, headers=headers)
        shown = CliRunner().invoke(
            app, ["top", server.url, "--once", "--interval", "0.1"], env={"JAXLLM_API_KEY": "sk-top", "COLUMNS": "100"}
        )
        assert shown.exit_code == 0, shown.output
        for words in ("running", "tokens/s out", "TTFT", "TPOT", "p99", "prefix hits", server.url):
            assert words in shown.output
        with pytest.raises(ConfigError, match=r"status 401: give --api-key"):
            CliRunner().invoke(app, ["top", server.url, "--once"], catch_exceptions=False, env={"JAXLLM_API_KEY": ""})


def test_addresses_without_a_server():
    for url, words in (("http://127.0.0.1:1", "refused"), ("127.0.0.1:8000", "http://"), ("file:///etc/hosts", "http")):
        with pytest.raises(ConfigError, match=words):
            CliRunner().invoke(app, ["top", url, "--once"], catch_exceptions=False)
    with pytest.raises(ValueError, match="jaxllm:"):
        parse("# TYPE a counter\na_total 1\n", 0.0)

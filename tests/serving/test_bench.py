"""`jaxllm bench serve --url`: what arrives online, sent to a server over HTTP."""

import json
import socket

import pytest
from typer.testing import CliRunner

from jaxllm.bench.serve import COUNTERS
from jaxllm.bench.served import PREFIX
from jaxllm.cli.app import app
from jaxllm.errors import InvalidRequestError
from tests.serving.harness import running

SIZES = ["--num-requests", "6", "--mean-in", "16", "--mean-out", "8", "--rate", "50", "--runs", "2"]


def run(*words):
    return CliRunner().invoke(app, ["bench", "serve", *map(str, words)])


def test_over_http(model, tmp_path):
    out = tmp_path / "out.json"
    with running(model, api_key=["secret"]) as server:
        done = run(*SIZES, "--url", server.url, "--api-key", "secret", "--model", model, "--json", out)
        assert done.exit_code == 0, done.output
        (rate,) = json.loads(out.read_text())["results"]
        for figures in rate["runs"]:
            assert figures["num_requests"] == 6 and figures["output_tok_s"] > 0
            assert 0 < figures["ttft"]["p50"] < figures["e2el"]["p50"]
        text = server.http.get("/metrics", headers={"authorization": "Bearer secret"}).text
        names = {line.partition("{")[0] for line in text.splitlines()}
        for counter in COUNTERS:  # under the names that `Served.stats` looks for
            assert {f"{PREFIX}{counter}_total", f"{PREFIX}num_{counter}_total"} & names
        refused = run(*SIZES, "--url", server.url, "--model", model)
        assert isinstance(refused.exception, InvalidRequestError) and "url=" in str(refused.exception)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert "is no server of a model" in str(run("--url", url, "--model", model).exception)


def test_the_server_has_its_own_settings(model):
    done = run("--url", "http://127.0.0.1:1", "--model", model, "--page-size", "16")
    assert isinstance(done.exception, InvalidRequestError) and "leave out page_size" in str(done.exception)
    with pytest.raises(InvalidRequestError):
        raise done.exception

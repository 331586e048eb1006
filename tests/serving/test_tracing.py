"""Spans of requests, as a collector receives them."""

import gzip
import http.server
import sys
import threading

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from jaxllm.errors import ConfigError
from jaxllm.serving.app import check
from jaxllm.serving.config import ServerConfig
from tests.serving.harness import running

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector(monkeypatch):
    """An OTLP collector over HTTP: (its address, the messages that it got)."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:

            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}/v1/traces", received
        served.shutdown()


def value(any_value):
    return getattr(any_value, any_value.WhichOneof("value"))


def test_spans_of_requests(model, collector):
    endpoint, received = collector
    caller = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    with running(model, served_model_name=["tiny"], otlp_traces_endpoint=endpoint) as server:
        body = {"prompt": [5, 6, 7], "max_tokens": 9, "ignore_eos": True, "temperature": 0.5, "n": 2}
        assert server.http.post("/v1/completions", json=body, headers=caller).status_code == 200
        assert server.post("/v1/embeddings", input=[[5, 6], [7]]).status_code == 200
        (word,) = server.services.llm.get_tokenizer().encode("a", add_special_tokens=False)
        assert server.post("/v1/completions", prompt="b", allowed_token_ids=[word], bad_words=["a"]).status_code == 500
        assert server.post("/v1/completions", prompt="b", nothing=1).status_code == 400  # no request of the engine's
        body = {"prompt": "b", "max_tokens": 400, "ignore_eos": True}
        assert server.http.post("/v1/completions", json=body, headers={"X-Request-Timeout": "0.01"}).status_code == 504
        assert server.post("/v1/completions", prompt="b", structured_outputs={"regex": "(b"}).status_code == 400
    spans = [
        (span, {item.key: value(item.value) for item in span.attributes}, resource.resource)
        for message in received
        for resource in message.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert [span.name for span, *_ in spans] == ["llm_request"] * 5
    (first, found, resource), (_, embedding, _), (failed, *_), (late, *_), (refused, *_) = spans
    assert {item.key: value(item.value) for item in resource.attributes}["service.name"] == "jaxllm"
    assert first.trace_id.hex() == TRACE and first.parent_span_id.hex() == PARENT
    assert found["gen_ai.request.id"] == "mine" and found["gen_ai.response.model"] == "tiny"
    assert (found["gen_ai.usage.prompt_tokens"], found["gen_ai.usage.completion_tokens"]) == (3, 18)
    assert (found["gen_ai.request.n"], found["gen_ai.request.max_tokens"]) == (2, 9)
    queue, first_token, end = (
        found[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_to_first_token", "e2e")
    )
    assert (
        0 <= queue <= first_token <= end == pytest.approx((first.end_time_unix_nano - first.start_time_unix_nano) / 1e9)
    )
    assert embedding["gen_ai.usage.prompt_tokens"] == 3 and embedding["gen_ai.usage.num_sequences"] == 2
    assert failed.status.code == 2 and "forbidden" in failed.status.message
    assert late.status.code == 2 and "deadline" in late.status.message
    assert refused.status.code == 2 and "structured_outputs.regex" in refused.status.message
    assert not first.status.code


def test_what_is_refused_before_the_engine_starts(monkeypatch):
    config = ServerConfig(otlp_traces_endpoint="http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "carrier-pigeon")
    with pytest.raises(ConfigError, match="must be 'grpc' or 'http/protobuf'"):
        check(config)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"needs the packages of the extra 'otel' \(opentelemetry.sdk.trace"):
        check(config)

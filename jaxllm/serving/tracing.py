"""OpenTelemetry traces: one span a request, with vLLM's names of attributes. Needs the extra `otel`."""

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"  # OpenTelemetry's own variable: "grpc", the default, or "http/protobuf"
HEADERS = (b"traceparent", b"tracestate")  # W3C's: the caller's span


class Tracing:
    """Turns finished requests into spans.

    Args:
      model: the attribute gen_ai.response.model.
      processor: takes the spans, and sends them on a thread of its own.
    """

    def __init__(self, model: str, processor: "SpanProcessor"):
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        # $OTEL_SERVICE_NAME and $OTEL_RESOURCE_ATTRIBUTES go before this.
        self._provider = TracerProvider(resource=Resource.create({} if _named() else {"service.name": "jaxllm"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("jaxllm.serving")
        self._model = model

    def request(
        self, seconds: float, caller: Mapping[str, str], attributes: Mapping[str, Any], error: str | None = None
    ) -> None:
        """A span of a request that has just ended.

        Args:
          seconds: how long it took.
          caller: the W3C headers that came with it; the span is a child of the caller's.
          attributes: those that are None are left out.
          error: why it failed, if it did.
        """
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end = time.time_ns()
        span = self._tracer.start_span(
            "llm_request",
            TraceContextTextMapPropagator().extract(caller),
            SpanKind.SERVER,
            {name: value for name, value in attributes.items() if value is not None}
            | {"gen_ai.response.model": self._model, "gen_ai.latency.e2e": seconds},
            start_time=end - int(seconds * 1e9),
        )
        if error is not None:
            span.set_status(StatusCode.ERROR, error)
        span.end(end)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def _named() -> bool:
    return "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")


def check_tracing(endpoint: str) -> None:
    """Raises ConfigError where the extra is missing or the protocol unknown."""
    _exporter_of(endpoint)


def open_tracing(endpoint: str, model: str) -> Tracing:
    """Traces that go to an OTLP collector. Raises ConfigError, see `check_tracing`."""
    exporter = _exporter_of(endpoint)(endpoint=endpoint)
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return Tracing(model, BatchSpanProcessor(exporter))


def _exporter_of(endpoint: str) -> Any:
    protocol = os.environ.get(PROTOCOL, "grpc")
    try:
        import opentelemetry.sdk.trace  # noqa: F401

        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc

            return grpc.OTLPSpanExporter
        if protocol == "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http import trace_exporter as http

            return http.OTLPSpanExporter
    except ImportError as error:
        missing = f"otlp_traces_endpoint={endpoint!r}: needs the packages of the extra 'otel' ({error.name} is missing)"
        raise ConfigError(missing) from None
    raise ConfigError(f"${PROTOCOL}={protocol!r}: must be 'grpc' or 'http/protobuf'")

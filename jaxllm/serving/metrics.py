"""Prometheus metrics, under vLLM's names with the prefix `jaxllm:`."""

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

PREFIX = "jaxllm:"
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_LONG = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)

# name, help, key of AsyncLLM.stats
GAUGES = (
    ("num_requests_running", "Samples in the running batch.", "running"),
    ("num_requests_waiting", "Samples that wait for a slot.", "waiting"),
    ("kv_cache_usage_perc", "Share of the KV cache's pages in use, 0 to 1.", "cache_usage"),
)
COUNTERS = (
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queried_tokens"),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hit_tokens"),
    ("num_preemptions", "Samples that lost their pages to another one.", "preemptions"),
    ("engine_steps", "Steps of the engine.", "steps"),
    ("engine_scheduled_tokens", "Tokens that went through the model.", "scheduled_tokens"),
    ("engine_padded_tokens", "The same with padding.", "padded_tokens"),
    ("late_compilations", "Executables compiled while serving.", "late_compilations"),
    ("engine_restarts", "Times that the engine's process has died and another was started.", "restarts"),
)
HISTOGRAMS = (
    ("engine_step_seconds", "Seconds of a step; their sum is the time in which a step was under way.", "step_seconds"),
    ("engine_step_tokens", "Tokens of a step, padding left out.", "step_tokens"),
)


class Metrics:
    """What the server measures itself, and the engine's figures as of the last heartbeat.

    Args:
      model: the label `model_name`.
      stats: the engine's last figures, and `restarts` as of now.
      depth: (samples under way, prompt tokens without output yet) at the server.
    """

    def __init__(self, model: str, stats: Callable[[], dict[str, Any]], depth: Callable[[], tuple[int, int]]):
        self.registry = CollectorRegistry()
        self._model, self._stats, self._depth = model, stats, depth
        self.registry.register(self)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, help, ["model_name", *labels], registry=self.registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(PREFIX + name, help, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.").labels(model)
        self.generated = 0  # output tokens; a plain number, since it changes with every one of them
        self._success = counter("request_success", "Samples by finish reason.", "finished_reason")
        self._http = counter("http_requests", "HTTP answers.", "path", "status")
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT)
        self.queue_time = histogram(
            "request_queue_time_seconds", "Arrival at the engine to a request's first step.", _TTFT
        )
        self.itl = histogram("inter_token_latency_seconds", "Between two outputs of a sample.", _ITL)
        self.tpot = histogram("request_time_per_output_token_seconds", "A sample's mean time for a token.", _ITL)
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to end.", _LONG)
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.output_length = histogram("request_generation_tokens", "Output tokens of a sample.", _TOKENS)

    def finished(self, reason: str) -> None:
        """A sample has ended."""
        self._success.labels(self._model, reason).inc()

    def answered(self, path: str, status: int) -> None:
        """An HTTP request has been answered; `path` is a route's, so that there are few of them."""
        self._http.labels(self._model, path, str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """The engine's figures (prometheus_client calls this at each scrape)."""
        stats = self._stats()
        for name, help, key in GAUGES:
            if key in stats:
                gauge = GaugeMetricFamily(PREFIX + name, help, labels=["model_name"])
                gauge.add_metric([self._model], stats[key])
                yield gauge
        for name, help, key in COUNTERS:
            if key in stats:
                counter = CounterMetricFamily(PREFIX + name, help, labels=["model_name"])
                counter.add_metric([self._model], stats[key])
                yield counter
        for name, help, key in HISTOGRAMS:
            if key in stats:
                yield self._histogram(name, help, stats[key])
        counter = CounterMetricFamily(PREFIX + "generation_tokens", "Tokens generated.", labels=["model_name"])
        counter.add_metric([self._model], self.generated)
        yield counter
        samples, tokens = self._depth()
        for name, help, value in (
            ("server_samples", "Samples under way at the server.", samples),
            ("server_waiting_tokens", "Prompt tokens of requests without output yet.", tokens),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, help, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge

    def _histogram(self, name: str, help: str, figures: dict[str, Any]) -> Metric:
        """One that the engine has counted, see `jaxllm.engine.figures.Histogram`."""
        family = HistogramMetricFamily(PREFIX + name, help, labels=["model_name"])
        bounds = [*map(floatToGoString, figures["bounds"]), "+Inf"]
        family.add_metric([self._model], list(zip(bounds, accumulate(figures["counts"]), strict=True)), figures["sum"])
        return family

"""What `jaxllm top` shows."""

import time
import urllib.error
import urllib.request

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxllm.errors import ConfigError
from jaxllm.serving.scraped import Between, Scrape, parse

LATENCIES = (
    ("queue", "request_queue_time_seconds"),
    ("TTFT", "time_to_first_token_seconds"),
    ("TPOT", "request_time_per_output_token_seconds"),
    ("ITL", "inter_token_latency_seconds"),
    ("end to end", "e2e_request_latency_seconds"),
    ("engine step", "engine_step_seconds"),
)


def scrape(url: str, api_key: str | None) -> Scrape:
    """Reads /metrics. Raises ConfigError naming the address where there is no such server."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return parse(answer.read().decode(), time.monotonic())
    except urllib.error.HTTPError as error:
        key = ": give --api-key" if error.code == 401 else ""
        raise ConfigError(f"url={url!r}: status {error.code}{key}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"url={url!r}: {getattr(error, 'reason', None) or error}") from None


def view(url: str, seen: Between, problem: str | None) -> Group:
    """All figures as they stand; `problem`: why the last reading failed, if it did."""
    load = Table(title=f"jaxllm  {url}", title_justify="left", show_header=False, box=None, padding=(0, 3, 0, 0))
    hits = seen.share("prefix_cache_hits_total", "prefix_cache_queries_total")
    left = {
        "running": _count(seen.value("num_requests_running")),
        "waiting": _count(seen.value("num_requests_waiting")),
        "cache in use": _percent(seen.value("kv_cache_usage_perc")),
        "prefix hits": _percent(hits),
        "a step under way": _percent(seen.rate("engine_step_seconds_sum")),
        "preemptions": _count(seen.value("num_preemptions_total")),
    }
    right = {
        "tokens/s out": _rate(seen, "generation_tokens_total"),
        "tokens/s computed": _rate(seen, "engine_scheduled_tokens_total"),
        "samples/s ended": _rate(seen, "request_success_total"),
        "steps/s": _rate(seen, "engine_steps_total"),
        "padding": _percent(_padding(seen)),
        "late compilations": _count(seen.value("late_compilations_total")),
    }
    for (name, value), (other, beside) in zip(left.items(), right.items(), strict=True):
        load.add_row(name, Text(value, "bold"), other, Text(beside, "bold"))
    latencies = Table(box=None, padding=(0, 3, 0, 0))
    latencies.add_column("latency")
    for name in ("p50", "p99"):
        latencies.add_column(name, justify="right")
    for label, name in LATENCIES:
        latencies.add_row(label, _milliseconds(seen.quantile(name, 0.5)), _milliseconds(seen.quantile(name, 0.99)))
    span = f"rates and quantiles over {seen.last.time - seen.first.time:.0f} s"
    return Group(load, "", latencies, "", Text(problem, "red") if problem else Text(span, "dim"))


def _padding(seen: Between) -> float | None:
    share = seen.share("engine_scheduled_tokens_total", "engine_padded_tokens_total")
    return None if share is None else 1 - share


def _rate(seen: Between, name: str) -> str:
    rate = seen.rate(name)
    return "–" if rate is None else f"{rate:,.1f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"

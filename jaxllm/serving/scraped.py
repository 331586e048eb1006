"""A server's /metrics, read from outside: gauges, rates and quantiles between two scrapes."""

import dataclasses
import math
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from jaxllm.serving.metrics import PREFIX


@dataclasses.dataclass(frozen=True)
class Scrape:
    """One reading.

    Attributes:
      time: seconds on the reader's clock.
      values: samples by name (without the prefix, with `_total`, `_sum`, …), summed over their labels.
      buckets: of histograms, by name: cumulative counts by upper bound.
    """

    time: float
    values: dict[str, float]
    buckets: dict[str, dict[float, float]]


def parse(text: str, time: float) -> Scrape:
    """Reads Prometheus's text format. Raises ValueError for what is none, or is not a jaxllm server's."""
    values: dict[str, float] = defaultdict(float)
    buckets: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.startswith(PREFIX):
                continue
            name = sample.name.removeprefix(PREFIX)
            if "le" in sample.labels:
                buckets[name.removesuffix("_bucket")][float(sample.labels["le"])] += sample.value
            else:
                values[name] += sample.value
    if not values:
        raise ValueError(f"no metric begins with {PREFIX}")
    return Scrape(time, dict(values), {name: dict(counts) for name, counts in buckets.items()})


@dataclasses.dataclass(frozen=True)
class Between:
    """What happened between two readings of a server."""

    first: Scrape
    last: Scrape

    def value(self, name: str) -> float | None:
        """The last value of a gauge; None if the server has none."""
        return self.last.values.get(name)

    def rise(self, name: str) -> float:
        """By how much a counter rose. Counters begin anew with the server: then what it has counted since."""
        last = self.last.values.get(name, 0.0)
        before = self.first.values.get(name, 0.0)
        return last - before if last >= before else last

    def rate(self, name: str) -> float | None:
        """A counter's rise a second; None where no time has passed."""
        seconds = self.last.time - self.first.time
        return self.rise(name) / seconds if seconds > 0 else None

    def share(self, part: str, whole: str) -> float | None:
        """A counter's rise as a share of another's; None where that did not rise."""
        total = self.rise(whole)
        return self.rise(part) / total if total > 0 else None

    def quantile(self, name: str, q: float) -> float | None:
        """The quantile q of what a histogram took in between, as Prometheus's `histogram_quantile` estimates it: on a
        straight line within a bucket; beyond the last bound that bound. None if it took in nothing."""
        last, first = self.last.buckets.get(name, {}), self.first.buckets.get(name, {})
        bounds = sorted(last)
        if not bounds:
            return None
        if last[bounds[-1]] < first.get(bounds[-1], 0.0):
            first = {}
        counts = [last[bound] - first.get(bound, 0.0) for bound in bounds]
        if counts[-1] <= 0:
            return None
        target = q * counts[-1]
        below, below_count = 0.0, 0.0
        for bound, count in zip(bounds, counts, strict=True):
            if count >= target and count > below_count:
                if math.isinf(bound):
                    return below
                return below + (bound - below) * (target - below_count) / (count - below_count)
            below, below_count = bound, count
        return below

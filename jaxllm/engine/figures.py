"""Figures of the steps, counted where they happen and read with the core's other figures."""

import dataclasses
import time
from bisect import bisect_left
from typing import Any

_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclasses.dataclass(slots=True)
class Histogram:
    """How many values were at most each of `bounds` and above the one before; the last count is of all beyond.

    Kept here, not in a metrics library: the engine knows none, and sends these as plain numbers.
    """

    bounds: tuple[float, ...]
    counts: list[int] = dataclasses.field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def json(self) -> dict[str, Any]:
        """As messages carry it."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum}


class StepFigures:
    """Histograms of steps.

    Attributes:
      seconds: of each step, from its launch, or from the end of the step before if that was later, until its tokens
        were read. So their sum is the time in which a step was under way.
      tokens: that each step computed, padding left out, over all ranks.
      host_seconds: what the loop's own work took in all, JAX's calls that launch steps included (see
        `Runner.seconds_launching`), waiting for the device left out.
    """

    def __init__(self) -> None:
        self.seconds, self.tokens = Histogram(_SECONDS), Histogram(_TOKENS)
        self.host_seconds = 0.0
        self._last_end = 0.0

    def read(self, launched_at: float, num_tokens: int) -> None:
        """A step launched at that time.monotonic() has just been read."""
        now = time.monotonic()
        self.seconds.observe(now - max(launched_at, self._last_end))
        self.tokens.observe(num_tokens)
        self._last_end = now

"""Who may come in: bounds on what waits, what to tell those who may not, and draining."""

import asyncio
import collections
import math
import time

from jaxllm.serving.errors import ApiError

RATE_WINDOW = 30.0  # most seconds over which the rate of finished samples is taken
LONGEST_RETRY = 60  # seconds


class Ticket:
    """A request that has been let in. `started` and `leave` may be called again and again."""

    def __init__(self, admission: "Admission", samples: int, tokens: int):
        self._admission, self._samples, self._tokens = admission, samples, tokens

    def started(self) -> None:
        """Its first output token has come: its prompt waits no more."""
        self._admission.waiting_tokens -= self._tokens
        self._tokens = 0

    def leave(self) -> None:
        """It has ended."""
        self.started()
        if self._samples:
            self._admission.left(self._samples)
            self._samples = 0


class Admission:
    """Counts samples and waiting prompt tokens against their bounds.

    Args:
      max_running: samples that run at once; beyond them they wait.
      max_queued_requests, max_queued_tokens: bounds of what waits. A request that is larger than a bound by itself is
        let in when nothing else is under way (or, of tokens, waits).

    Attributes:
      samples: of requests that are in.
      waiting_tokens: prompt tokens of requests that have no output yet.
      draining: nobody is let in any more.
    """

    def __init__(self, max_running: int, max_queued_requests: int, max_queued_tokens: int):
        self._max_running, self._max_queued, self._max_tokens = max_running, max_queued_requests, max_queued_tokens
        self.samples = self.waiting_tokens = 0
        self.draining = False
        self._ends: collections.deque[tuple[float, int]] = collections.deque()
        self._ended = 0  # their samples
        self._busy_since = 0.0
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self, samples: int) -> None:
        """Raises ApiError for a request that would not be let in, so that no work is spent on it: see `enter`."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", None, "draining", retry_after=LONGEST_RETRY)
        over = self.samples + samples - self._max_running - self._max_queued
        if over > 0 and self.samples:
            message = f"{self.samples} samples are under way: at most max_queued_requests={self._max_queued} may wait"
            raise ApiError(429, message, None, "queue_full", retry_after=self._retry_after(over))

    def enter(self, samples: int, tokens: int) -> Ticket:
        """Lets a request in. Raises ApiError: 503 while draining, 429 where a bound is passed."""
        self.check(samples)
        if self.waiting_tokens and self.waiting_tokens + tokens > self._max_tokens:
            message = f"{self.waiting_tokens} prompt tokens wait: at most max_queued_tokens={self._max_tokens} may"
            raise ApiError(429, message, None, "queue_full", retry_after=self._retry_after(1))
        if not self.samples:
            self._busy_since = time.monotonic()
        self.samples += samples
        self.waiting_tokens += tokens
        self._idle.clear()
        return Ticket(self, samples, tokens)

    def left(self, samples: int) -> None:
        """Samples have ended (for tickets)."""
        self.samples -= samples
        now = time.monotonic()
        self._ends.append((now, samples))
        self._ended += samples
        self._forget(now)
        if not self.samples:
            self._idle.set()

    def _forget(self, now: float) -> None:
        while self._ends and self._ends[0][0] < max(now - RATE_WINDOW, self._busy_since):
            self._ended -= self._ends.popleft()[1]

    def _retry_after(self, over: int) -> int:
        """Seconds until so many samples will have ended, at the rate of the last half minute or since all was idle."""
        now = time.monotonic()
        self._forget(now)
        rate = self._ended / min(RATE_WINDOW, max(now - self._busy_since, 1e-3))
        return min(LONGEST_RETRY, max(1, math.ceil(over / rate))) if rate else 1

    async def drained(self) -> None:
        """Waits until all requests have ended."""
        await self._idle.wait()

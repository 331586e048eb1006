"""Where an output stands in its grammar."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import llguidance

THREADS = 4  # a mask takes some 30 µs: more threads take longer to wake up than they save


class Matcher:
    """One output's place in its grammar.

    It follows the tokens that are known, wherever they came from: so it needs no care when a request is preempted,
    recomputed or goes on elsewhere.

    Args:
      start: at the grammar's start; copied.

    Attributes:
      error: why the grammar cannot go on, once it cannot.
    """

    def __init__(self, start: "llguidance.LLMatcher"):
        self.inner = start.deep_copy()
        self.num_consumed = 0
        self.error: str | None = None

    def follow(self, tokens: Sequence[int], begin: int = 0) -> None:
        """Goes on to the end of an output, tokens[begin:], whose beginning it has seen. Sets `error` at a forbidden
        token."""
        for token in tokens[begin + self.num_consumed :]:
            if self.error is None and not self.inner.consume_token(token):
                self.error = f"token {token} does not go on with structured_outputs: {self.inner.get_error()}"
        self.num_consumed = len(tokens) - begin

    def check(self) -> None:
        """Sets `error` if a mask could not be computed within the limits."""
        if self.error is None and self.inner.is_error():
            self.error = f"structured_outputs cannot go on: {self.inner.get_error()}"


class Masks:
    """Computes masks on threads of its own."""

    def __init__(self) -> None:
        import llguidance

        self._executor = llguidance.LLExecutor(THREADS)

    def fill(self, matchers: Sequence[Matcher], out: np.ndarray) -> None:
        """Fills row i of int32[M, ceil(V / 32)], contiguous, with what matchers[i] allows next: bit j % 32 of word
        j // 32 tells of token j. Sets `error` of those that cannot say."""
        assert out.dtype == np.int32 and out.flags.c_contiguous and len(matchers) <= len(out)
        width = out.shape[1] * 4
        if len(matchers) == 1:
            matchers[0].inner.unsafe_compute_mask_ptr(out.ctypes.data, width)
        else:
            jobs = [(matcher.inner, index) for index, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(jobs, out.ctypes.data, width, len(out))
        for matcher in matchers:
            matcher.check()

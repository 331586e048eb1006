"""Text to a terminal as it comes, and how fast it came."""

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass
class Streamed:
    """What one answer brought. Seconds count from the request's submission."""

    text: str = ""
    num_tokens: int = 0
    first_token: float = 0.0
    last_token: float = 0.0
    interrupted: bool = False

    def speed(self) -> str:
        """Tokens/s and time to first token, in words."""
        if not self.num_tokens:
            return "no tokens"
        words = f"{self.num_tokens} tokens"
        if self.last_token > self.first_token:
            words += f", {(self.num_tokens - 1) / (self.last_token - self.first_token):.1f} tokens/s"
        return f"{words}, first token after {self.first_token:.2f} s"


def stream_answer(deltas: Iterator[Any]) -> Streamed:
    """Writes deltas to stdout. Ctrl-C ends the answer, not the program: `interrupted` tells."""
    answer, begin = Streamed(), time.perf_counter()
    try:
        for delta in deltas:
            if delta.token_ids:
                answer.last_token = time.perf_counter() - begin
                answer.first_token = answer.first_token or answer.last_token
                answer.num_tokens += len(delta.token_ids)
            if delta.text:
                answer.text += delta.text
                sys.stdout.write(delta.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        answer.interrupted = True
        deltas.close()  # type: ignore[attr-defined]  # aborts the request
    return answer


def since_process_start() -> float | None:
    """Seconds since this process was started, the interpreter's own start included; None where /proc does not tell."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rsplit(b")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return None

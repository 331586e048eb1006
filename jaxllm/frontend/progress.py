"""A progress bar with tokens/s for batches of requests."""

import time
from typing import Any


class TokenProgress:
    """Counts finished samples and tokens; a context manager that shows nothing unless `show`."""

    def __init__(self, total: int, show: bool):
        self._show, self._total = show, total
        self._tokens = self._done = 0
        self._bar: Any = None

    def __enter__(self) -> "TokenProgress":
        if self._show:
            from rich import console, progress

            self._bar = progress.Progress(
                progress.TextColumn("Generating"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]:.0f} tok/s"),
                progress.TimeRemainingColumn(),
                console=console.Console(stderr=True),
                redirect_stdout=False,  # what others print meanwhile stays on stdout
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, rate=0.0)
            self._begin = time.perf_counter()
        return self

    def update(self, num_tokens: int, num_finished: int) -> None:
        """Takes one step in: its tokens, and how many samples it finished."""
        if self._bar is None:
            return
        self._tokens += num_tokens
        self._done += num_finished
        rate = self._tokens / max(time.perf_counter() - self._begin, 1e-9)
        self._bar.update(self._task, completed=self._done, rate=rate)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

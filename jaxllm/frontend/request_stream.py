"""One request's output as a coroutine reads it."""

import asyncio
from collections.abc import Collection

from jaxllm.frontend.collector import RequestCollector
from jaxllm.frontend.outputs import CompletionOutput


class RequestStream:
    """A request whose output somebody waits for; all of it belongs to one event loop, and one coroutine reads.

    A slow reader does not make the engine wait nor its memory grow: what it has not read yet is merged into one delta
    for each sample.

    Attributes:
      collector: its output so far.
      waiter: of who waits for it in `wait_any`.
    """

    def __init__(self, collector: RequestCollector):
        self.collector = collector
        self._unread: dict[int, CompletionOutput] = {}
        self._error: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None

    def put(self, delta: CompletionOutput) -> None:
        """Adds what is new of one sample."""
        waiting = self._unread.get(delta.index)
        if waiting is None:
            self._unread[delta.index] = delta
        else:
            _merge(waiting, delta)
        wake(self.waiter)

    def fail(self, error: Exception) -> None:
        """Ends the reading with an error, once what is there has been read."""
        self._error = error
        wake(self.waiter)

    @property
    def ready(self) -> bool:
        """Whether `take` has something to say."""
        return bool(self._unread) or self._error is not None or self.collector.output.finished

    @property
    def error(self) -> Exception | None:
        """What `read` raises, or will."""
        return self._error or self.collector.error

    def take(self) -> list[CompletionOutput] | None:
        """What is new, a delta for each sample that has any; None if there is nothing yet, empty at the end. Raises any
        of jaxllm.errors, or what `fail` was given."""
        unread, self._unread = self._unread, {}
        if self.collector.error is None:
            deltas = [delta for delta in unread.values() if delta.text or delta.token_ids or delta.finished]
            if deltas:
                return deltas
        if self.error is not None:
            raise self.error
        return [] if self.collector.output.finished else None

    async def read(self) -> list[CompletionOutput]:
        """As `take`, but waits for something new, or the end."""
        while (deltas := self.take()) is None:
            await wait_any([self])
        return deltas


async def wait_any(streams: Collection[RequestStream], timeout: float | None = None) -> None:
    """Waits until one of them is ready, or for so many seconds."""
    for stream in streams:
        if stream.ready:
            return
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    for stream in streams:
        stream.waiter = waiter
    timer = None if timeout is None else loop.call_later(timeout, wake, waiter)
    try:
        await waiter
    finally:
        for stream in streams:
            stream.waiter = None
        if timer is not None:
            timer.cancel()


def wake(waiter: "asyncio.Future[None] | None") -> None:
    """Ends a wait."""
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def _merge(first: CompletionOutput, second: CompletionOutput) -> None:
    first.text += second.text
    first.token_ids += second.token_ids
    first.finish_reason, first.stop_reason, first.error = second.finish_reason, second.stop_reason, second.error
    if second.logprobs is not None:
        first.logprobs = [] if first.logprobs is None else first.logprobs
        first.logprobs += second.logprobs
        first.cumulative_logprob = (first.cumulative_logprob or 0.0) + (second.cumulative_logprob or 0.0)

"""The requests that wait for a slot, best first."""

import heapq
from collections.abc import Collection, Iterator

from jaxllm.core.request import Request, Status


class WaitingQueue:
    """A heap by `Request.rank`. Requests that end while they wait stay in it until somebody comes across them."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, float, int], Request]] = []
        self._held: list[Request] = []  # by `restrict`
        self._only: Collection[Request] | None = None

    def push(self, request: Request) -> None:
        """Adds a waiting request."""
        if self._only is None or request in self._only:
            heapq.heappush(self._heap, (request.rank, request))
        else:
            self._held.append(request)

    def best(self) -> Request | None:
        """The first to be admitted, or None."""
        heap = self._heap
        while heap and heap[0][1].status is not Status.WAITING:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def pop(self) -> None:
        """Takes `best()` out."""
        heapq.heappop(self._heap)

    def restrict(self, only: Collection[Request] | None) -> None:
        """Holds back all but these from now on, also of those that come later; None: nobody any more."""
        queued = list(self)
        self._only, self._heap, self._held = only, [], []
        for request in queued:
            self.push(request)

    def prune(self, num_waiting: int) -> None:
        """Forgets ended requests if they are more than the `num_waiting` that wait: the cost stays O(1) a request."""
        if len(self._heap) > 2 * num_waiting + 64:
            self._heap = [entry for entry in self._heap if entry[1].status is Status.WAITING]
            heapq.heapify(self._heap)

    def __iter__(self) -> Iterator[Request]:
        """All that wait, those held back included."""
        for request in [*(request for _, request in self._heap), *self._held]:
            if request.status is Status.WAITING:
                yield request

"""What runs in the next step: each request's computed tokens catch up with its known ones, under one token budget."""

import dataclasses
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Sequence
from operator import attrgetter

from jaxllm.core.batch import Batch, Row
from jaxllm.core.kv_cache import KVCache, PageUpdates
from jaxllm.core.request import Request, Status
from jaxllm.core.scheduler_config import SchedulerConfig
from jaxllm.core.waiting import WaitingQueue
from jaxllm.errors import InvalidRequestError, QueueFullError

__all__ = ["Progress", "Scheduler", "SchedulerConfig", "Update"]

_rank = attrgetter("rank")


@dataclasses.dataclass(slots=True)
class Update:
    """What a step brought for one request: its new tokens (the stop token included) and its status after them."""

    request: Request
    new_tokens: list[int]
    status: Status

    @property
    def ended(self) -> bool:
        return self.status >= Status.STOPPED


@dataclasses.dataclass(slots=True)
class Progress:
    """What a step brought.

    Most requests get one token and there is nothing else to say of them (`Request.plain`): these are `requests` and
    `tokens`, side by side, so that no object is made for a token. `updates` are all others.
    """

    requests: list[Request]
    tokens: list[int]
    updates: list[Update]


@dataclasses.dataclass(slots=True)
class _Plan:
    """A batch in the making."""

    budget: int
    page_updates: PageUpdates
    fed: list[Row] = dataclasses.field(default_factory=list)  # see Batch.num_fed
    ones: list[Row] = dataclasses.field(default_factory=list)  # other rows of one token
    chunks: list[Row] = dataclasses.field(default_factory=list)  # longer rows
    admitted: set[Request] = dataclasses.field(default_factory=set)
    pages_short: bool = False  # a running request lacked pages: admit nobody


class Scheduler:
    """Decides each step's rows. Knows neither the clock nor the device: `schedule` and `finish` are all there is to it.

    Steps overlap: `schedule` may be called for further steps before `finish` has been for the earlier ones. `finish`
    takes batches in the order in which `schedule` made them. Pages are given away as soon as a request ends or is
    preempted, though launched steps may still use them: the device runs steps in order, so the new owner's writes
    come after.

    A row that samples normally yields one token. It may yield more (speculation), if at most one further step is
    launched before it is finished. That step's row then falls short of the true end of the slot's history, which only
    the device knows: the device must yield [] for a row that samples but has not caught up with it, and shorten a row
    that reaches past it.

    One order decides everything, `Request.rank`: priority (under that policy), arrival, order of `add`. Running
    requests go first, best first; whoever lacks pages takes them from the worst running one, never from a better one,
    else waits. So the best request always proceeds, and after it the next.
    """

    def __init__(self, config: SchedulerConfig, kv_cache: KVCache):
        self.config = config
        self.kv_cache = kv_cache
        self.requests: dict[str, Request] = {}  # all that have not ended
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of all that have not ended
        self._running: list[Request] = []  # by rank
        self._waiting = WaitingQueue()  # all that wait but followers and those with a token still under way
        self._followers: dict[str, list[Request]] = {}  # waiting for their leader, by its id
        self._in_flight: deque[Batch] = deque()
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._num_waiting_tokens = 0  # prompt tokens of waiting requests
        self._num_added = 0

    # Requests come and go

    def add(self, request: Request, admitted: bool = False) -> None:
        """Queues a request. Raises InvalidRequestError if it can never run, QueueFullError if too much waits.

        admitted: it has been let in elsewhere, however much waits here.
        """
        self._check_servable(request)
        if not admitted:
            self._check_queue(request)
        config = self.config
        self._num_added += 1
        request.rank = (request.priority if config.policy == "priority" else 0, request.arrival, self._num_added)
        request.limit = min(request.num_prompt_tokens + request.max_tokens, config.max_model_len)
        request.status = Status.WAITING
        leader = self._leader(request)
        self.requests[request.id] = request
        self.num_prompt_tokens += request.num_prompt_tokens
        self._num_waiting_tokens += request.num_prompt_tokens
        if leader is not None and not self._prompt_is_computed(leader):
            self._followers.setdefault(leader.id, []).append(request)
        else:
            self._waiting.push(request)

    def _check_servable(self, request: Request) -> None:
        num_tokens, max_model_len = len(request.tokens), self.config.max_model_len
        if request.id in self.requests:
            raise InvalidRequestError("id", request.id, "must be unique among live requests")
        if not 1 <= request.num_prompt_tokens <= num_tokens:
            raise InvalidRequestError("num_prompt_tokens", request.num_prompt_tokens, f"must be in [1, {num_tokens}]")
        if num_tokens >= max_model_len:
            limit = f"must be less than max_model_len={max_model_len}, to leave room for an output token"
            raise InvalidRequestError("number of tokens", num_tokens, limit)
        if request.num_output_tokens >= request.max_tokens:
            limit = f"must be more than the {request.num_output_tokens} output tokens already emitted"
            raise InvalidRequestError("max_tokens", request.max_tokens, limit)
        # The last token is sampled, never computed.
        num_computed = min(request.num_prompt_tokens + request.max_tokens, max_model_len) - 1
        if unfit := self.kv_cache.unfit(num_computed):
            raise InvalidRequestError("max_tokens", request.max_tokens, f"with the prompt can never fit: {unfit}")

    def _check_queue(self, request: Request) -> None:
        config, num_waiting = self.config, self.num_waiting
        if config.max_waiting_requests is not None and num_waiting >= config.max_waiting_requests:
            raise QueueFullError(f"{num_waiting} requests wait, max_waiting_requests={config.max_waiting_requests}")
        num_tokens = self._num_waiting_tokens + request.num_prompt_tokens
        if config.max_waiting_tokens is not None and num_waiting and num_tokens > config.max_waiting_tokens:
            raise QueueFullError(
                f"{self._num_waiting_tokens} prompt tokens wait and {request.num_prompt_tokens} more came, "
                f"max_waiting_tokens={config.max_waiting_tokens}"
            )

    def abort(self, request_id: str) -> Update | None:
        """Ends a request; None if there is none (any more) of that id."""
        return self.finish_request(request_id, Status.ABORTED)

    def finish_request(self, request_id: str, status: Status) -> Update | None:
        """Ends a request for a reason found outside. What launched steps still bring for it is dropped.

        With ERROR its pages leave the prefix cache.
        """
        request = self.requests.get(request_id)
        if request is None:
            return None
        if request.status is Status.RUNNING:
            self._running.remove(request)
        self._end(request, status)
        self._waiting.prune(self.num_waiting)
        return Update(request, [], status)

    def recompute_all(self) -> None:
        """Starts all over from the known tokens: launched steps and the device's whole state are lost."""
        self._in_flight.clear()
        for request in self.requests.values():
            if request.num_pending and request.status is Status.WAITING:
                self._waiting.push(request)
            request.num_pending = 0
        while self._running:
            self._preempt_worst()
        self.kv_cache.reset_prefix_cache()

    def restrict(self, only: Collection[Request] | None) -> None:
        """From now on admits nobody but these; None: everybody again. Those that run already go on."""
        self._waiting.restrict(only)

    # A step begins

    def schedule(self, now: float) -> Batch | None:
        """The next step's batch, or None if nothing can be computed before a launched step is finished.

        `now` is in seconds; no policy looks at it yet, it only marks when requests were first scheduled.
        """
        plan = _Plan(self.config.max_num_batched_tokens, [[] for _ in self.kv_cache.groups])
        if self.config.policy == "priority":
            self._preempt_for_priority()
        self._schedule_running(plan)
        self._admit_waiting(plan, now)
        if not plan.fed and not plan.ones and not plan.chunks:
            return None
        self._cut_to_rung(plan)
        rows = plan.fed + plan.ones + plan.chunks
        new_slots = [i for i, row in enumerate(rows) if row.request in plan.admitted] if plan.admitted else []
        num_tokens = self.config.max_num_batched_tokens - plan.budget
        batch = Batch(rows, new_slots, plan.page_updates, num_tokens, len(plan.fed))
        self._in_flight.append(batch)
        return batch

    def _schedule_running(self, plan: _Plan) -> None:
        running, fed, budget = self._running, plan.fed, plan.budget
        for i, request in enumerate(running):  # preemption shortens the list behind us, which is safe
            start, pending = request.num_computed, request.num_pending
            total = len(request.tokens) + pending
            if total >= request.limit:
                continue  # launched steps bring its last token
            end = total
            if total - start > 1:  # leaves one token of the budget for each request that follows
                end = min(total, start + budget - (len(running) - i - 1))
            if end > request.capacity:
                end = start + self._secure_pages(request, end - start, plan)
                if end == start:
                    continue
            length = end - start
            samples = end == total
            request.num_computed = end
            row = Row(request, request.slot, start, length, samples, request.num_preemptions)
            if samples:
                request.num_pending = pending + 1
            if length > 1:
                plan.chunks.append(row)
            elif samples and pending:  # the token before the last of all is not known here
                fed.append(row)
            else:
                plan.ones.append(row)
            budget -= length
        plan.budget = budget

    def _secure_pages(self, request: Request, length: int, plan: _Plan) -> int:
        """Pages for up to `length` more tokens, at least one at worse requests' cost; 0 if there are none."""
        while True:
            granted = self.kv_cache.extend(request, length, plan.page_updates)
            if granted < length:
                plan.pages_short = True
            if granted:
                return granted
            if self._running[-1] is request:
                return 0
            self._preempt_worst()

    def _admit_waiting(self, plan: _Plan, now: float) -> None:
        """Admits the best waiting requests, strictly in order: nobody overtakes one that waits for pages or a slot."""
        while plan.budget and not plan.pages_short and self._free_slots:
            request = self._waiting.best()
            if request is None:
                return
            prefix = self.kv_cache.find_prefix(request, self._leader(request))
            if max(self.kv_cache.missing_pages(request, prefix, headroom=len(self._running))) > 0:
                return
            self._waiting.pop()
            request.status = Status.RUNNING
            request.slot = self._free_slots.pop()
            self._num_waiting_tokens -= request.num_prompt_tokens
            insort(self._running, request, key=_rank)
            if request.num_preemptions == 0:
                request.first_scheduled = now
                self.kv_cache.record_query(request, prefix)
            self.kv_cache.attach(request, prefix, plan.page_updates)
            self._wake_followers_if_computed(request)
            start, total = request.num_computed, len(request.tokens)
            length = self.kv_cache.extend(request, min(total - start, plan.budget), plan.page_updates)
            row = Row(request, request.slot, start, length, start + length == total, request.num_preemptions)
            request.num_computed += length
            request.num_pending = int(row.samples)
            (plan.ones if length == 1 else plan.chunks).append(row)
            plan.admitted.add(request)
            plan.budget -= length

    def _cut_to_rung(self, plan: _Plan) -> None:
        """Cuts the last chunk so that the step lands on the rung below, if that saves more than it puts off.

        That is if the padding up to the rung above is at least the excess over the rung below; the excess runs with the
        next step. A chunk keeps at least half its tokens, so a prompt is put off by at most log2(length) steps.
        """
        rungs, total = self.config.token_rungs, self.config.max_num_batched_tokens - plan.budget
        above = bisect_left(rungs, total)
        if not plan.chunks or above == 0 or rungs[above - 1] < self.config.weight_bound_tokens:
            return
        excess, padding = total - rungs[above - 1], rungs[above] - total
        row = plan.chunks[-1]
        if padding == 0 or padding < excess or row.length < 2 * excess:
            return
        row.length -= excess
        row.request.num_computed -= excess
        row.request.num_pending -= row.samples
        row.samples = False
        plan.budget += excess
        if row.length == 1:
            plan.ones.append(plan.chunks.pop())

    # Who waits, who gives way

    def _preempt_for_priority(self) -> None:
        """Makes room for the best waiting request by preempting those of strictly worse priority, if that helps."""
        request = self._waiting.best()
        if request is None or not self._running or self._running[-1].priority <= request.priority:
            return
        prefix = self.kv_cache.find_prefix(request, self._leader(request))
        worse = [other for other in self._running if other.priority > request.priority]
        missing = self.kv_cache.missing_pages(request, prefix, headroom=len(self._running) - len(worse))
        for g, count in enumerate(missing):
            if count > sum(len(other.pages.tables[g]) for other in worse if other.pages):
                return
        while worse:
            missing = self.kv_cache.missing_pages(request, prefix, headroom=len(self._running))
            if self._free_slots and max(missing) <= 0:
                return
            worse.pop()
            self._preempt_worst()

    def _preempt_worst(self) -> None:
        """The worst running request loses its pages and its slot; its known tokens will be recomputed."""
        request = self._running.pop()
        self._release(request)
        request.status = Status.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._num_waiting_tokens += request.num_prompt_tokens
        if not request.num_pending:  # else `finish` queues it with its last pending token
            self._waiting.push(request)

    def _release(self, request: Request, forget: bool = False) -> None:
        self.kv_cache.free(request, forget)
        self._free_slots.append(request.slot)
        request.slot = -1

    def _end(self, request: Request, status: Status) -> None:
        """All but the removal from `_running`."""
        if request.status is Status.RUNNING:
            self._release(request, forget=status is Status.ERROR)
        else:
            self._num_waiting_tokens -= request.num_prompt_tokens
        request.status = status
        request.pages = None
        del self.requests[request.id]
        self.num_prompt_tokens -= request.num_prompt_tokens
        self._wake_followers(request)

    def _leader(self, request: Request) -> Request | None:
        return None if request.leader is None else self.requests.get(request.leader)

    def _prompt_is_computed(self, leader: Request) -> bool:
        """Whether all the leader's full prompt pages are there to be shared."""
        num_committed = 0 if leader.pages is None else leader.pages.num_committed
        return num_committed >= leader.num_prompt_tokens // self.kv_cache.page_size

    def _wake_followers_if_computed(self, leader: Request) -> None:
        if leader.id in self._followers and self._prompt_is_computed(leader):
            self._wake_followers(leader)

    def _wake_followers(self, leader: Request) -> None:
        for request in self._followers.pop(leader.id, ()):
            if request.status is Status.WAITING:
                self._waiting.push(request)

    # A step ends

    def finish(self, batch: Batch, tokens: Sequence[int | list[int]]) -> Progress:
        """Takes in the oldest launched step's sampled tokens: tokens[i] are row i's, one or a list ([] if it has none).

        Rows whose request has ended meanwhile are dropped; tokens after a stop token or beyond the limit too. Returns
        the requests that got tokens. Raises ValueError if it is not that batch's turn.
        """
        if not self._in_flight or self._in_flight[0] is not batch or len(tokens) != len(batch.rows):
            raise ValueError("finish takes the oldest unfinished batch, with a token or a list of them for each row")
        self._in_flight.popleft()
        waiting, running = Status.WAITING, Status.RUNNING
        progress = Progress([], [], [])
        plain_requests, plain_tokens = progress.requests, progress.tokens
        any_ended = False
        for row, new in zip(batch.rows, tokens, strict=True):
            request = row.request
            status = request.status
            if status is not running and status is not waiting:
                continue
            known = request.tokens
            if row.epoch == request.num_preemptions:
                end = row.start + row.length
                if end >= request.commit_at:
                    self._commit(request, min(end, len(known)))
            if not row.samples:
                continue
            request.num_pending -= 1
            if (
                request.plain
                and type(new) is int
                and len(known) + 1 < request.limit
                and new not in request.stop_token_ids
            ):  # the usual case, made fast
                known.append(new)
                plain_requests.append(request)
                plain_tokens.append(new)
            else:
                accepted, status = self._accept(request, [new] if isinstance(new, int) else new)
                any_ended |= status >= Status.STOPPED
                if accepted:
                    request.plain = request.params.logprobs is None
                    progress.updates.append(Update(request, accepted, status))
            if status is waiting and not request.num_pending:
                self._waiting.push(request)
        if any_ended:
            self._running = [request for request in self._running if request.status is running]
        return progress

    def _accept(self, request: Request, new: list[int]) -> tuple[list[int], Status]:
        """Appends tokens up to the first that ends the request; returns these and the request's status."""
        if not new:  # only beside rows that bring several: one token less than later rows counted on
            request.num_computed = max(0, min(request.num_computed, request.num_tokens - 1))
        for count, token in enumerate(new, 1):
            request.tokens.append(token)
            if token in request.stop_token_ids:
                request.stop_token = token
                self._end(request, Status.STOPPED)
            elif len(request.tokens) >= request.limit:
                self._end(request, Status.LENGTH)
            else:
                continue
            return new[:count], request.status
        return new, request.status

    def _commit(self, request: Request, num_computed: int) -> None:
        if num_computed >= request.commit_at:
            self.kv_cache.commit(request, num_computed)
            self._wake_followers_if_computed(request)

    # Figures and checks

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self._in_flight)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self.requests) - len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Launched steps that `finish` has not seen."""
        return len(self._in_flight)

    def check(self) -> None:
        """Raises AssertionError if any invariant of the scheduler or the cache is broken. O(requests and pages)."""
        running = [r for r in self.requests.values() if r.status is Status.RUNNING]
        waiting = [r for r in self.requests.values() if r.status is Status.WAITING]
        assert len(running) + len(waiting) == len(self.requests), "an ended request is still listed"
        assert sorted(running, key=_rank) == self._running, "the running list is wrong or out of order"
        slots = [r.slot for r in running] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_num_seqs)), "a slot is lost or held twice"
        assert self._num_waiting_tokens == sum(r.num_prompt_tokens for r in waiting), "waiting tokens miscounted"
        assert self.num_prompt_tokens == sum(r.num_prompt_tokens for r in self.requests.values()), "tokens miscounted"
        queued = list(self._waiting)
        queued += [r for rs in self._followers.values() for r in rs if r.status is Status.WAITING]
        queued += [r for r in waiting if r.num_pending]
        assert len(queued) == len(waiting) and set(queued) == set(waiting), "a waiting request is lost or queued twice"
        assert self._followers.keys() <= self.requests.keys(), "followers of a leader that has ended"
        for r in running:
            assert r.num_computed < r.num_tokens and len(r.tokens) < r.limit, f"{r.id} has nothing left to compute"
            assert r.pages is not None and r.num_computed <= r.capacity, f"{r.id} lacks pages"
            assert r.capacity == len(r.pages.tables[0]) * self.kv_cache.page_size, f"{r.id}: wrong capacity"
        for r in waiting:
            assert r.slot == -1 and r.num_computed == r.capacity == 0, f"{r.id} waits but holds something"
        sampling = [row.request for batch in self._in_flight for row in batch.rows if row.samples]
        for r in self.requests.values():
            assert r.num_pending == sum(other is r for other in sampling), f"{r.id}: pending tokens miscounted"
        self.kv_cache.check(self.requests.values())

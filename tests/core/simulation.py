"""A simulated device and the book-keeping around a scheduler, shared by the seeded simulation and the state machine.

The device keeps real page tables, fed by `Batch.page_updates` alone, and for each place in a page the fingerprint of
what was written there: the token, all tokens before it, salt, adapter and weights. A row that reads a place which
another request has overwritten, which nobody has written, or which holds another prefix, fails at once.
"""

import dataclasses
import random
from collections import deque

from jaxllm.core.batch import Batch
from jaxllm.core.kv_cache import CacheGroup, KVCache
from jaxllm.core.prefix import hash_page
from jaxllm.core.request import Request, Status
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.core.scheduler import Scheduler, SchedulerConfig, Update
from jaxllm.errors import InvalidRequestError, QueueFullError

VOCABULARY = 40
PLAIN, PROMPT_LOGPROBS = SamplingParams(), SamplingParams(prompt_logprobs=1)


def sample(seed: int, position: int) -> int:
    """The token that a request of this seed gets at this position, whatever happens around it."""
    return (((seed * 1000003) ^ (position * 2654435761)) * 0x9E3779B1 >> 9) % VOCABULARY


@dataclasses.dataclass(slots=True)
class Slot:
    request: Request
    tokens: list[int]  # the device's own history
    prints: list[int]  # fingerprints of the computed tokens


class Device:
    def __init__(self, groups: tuple[CacheGroup, ...], num_slots: int, max_model_len: int, max_tokens_per_row: int):
        self.groups = groups
        self.page_size = groups[0].page_size
        self.max_tokens_per_row = max_tokens_per_row
        self.weights = 0
        self.random = random.Random(0)
        self.slots: list[Slot | None] = [None] * num_slots
        self.table_length = max_model_len // self.page_size + 1
        self.tables = [[[0] * self.table_length for _ in range(num_slots)] for _ in groups]
        self.wipe()

    def wipe(self) -> None:
        self.pages = [[[0] * self.page_size for _ in range(group.num_pages)] for group in self.groups]
        self.slots = [None] * len(self.slots)

    def run(self, batch: Batch) -> list[list[int]]:
        """Executes a step in the order of launches; returns each row's sampled tokens."""
        for i in batch.new_slots:
            self._fill_slot(batch.rows[i].slot, batch.rows[i].request, batch.rows[i].start)
        for tables, updates in zip(self.tables, batch.page_updates, strict=True):
            for slot_index, index, page in updates:
                assert page > 0, "the dummy page was handed out"
                tables[slot_index][index] = page
        for row in batch.rows:  # all reads before all writes: rows of one step may not depend on each other
            self._read(row.slot, row.request, row.start)
        results = []
        for row in batch.rows:
            slot = self.slots[row.slot]
            assert slot is not None
            end = min(row.start + row.length, len(slot.tokens))  # only shorter where rows bring several tokens
            assert end == row.start + row.length or self.max_tokens_per_row > 1, "a token that nobody knows"
            self._write(row.slot, slot, row.start, end)
            caught_up = end == len(slot.tokens)
            assert row.samples == caught_up or self.max_tokens_per_row > 1, "samples must mean: caught up"
            new = []
            if row.samples and caught_up:
                for _ in range(self.random.randint(1, self.max_tokens_per_row)):
                    new.append(sample(slot.request.seed, len(slot.tokens)))
                    slot.tokens.append(new[-1])
            results.append(new)
        return results

    def _root(self, request: Request) -> int:
        return hash((self.weights, request.cache_salt, request.adapter))

    def _fill_slot(self, index: int, request: Request, start: int) -> None:
        slot = self.slots[index] = Slot(request, list(request.tokens), [])
        self._extend_prints(slot, start)
        for tables in self.tables:
            tables[index] = [0] * self.table_length

    def _extend_prints(self, slot: Slot, end: int) -> None:
        prints, tokens = slot.prints, slot.tokens
        last = prints[-1] if prints else self._root(slot.request)
        for position in range(len(prints), end):
            last = hash((last, tokens[position], self.weights))
            prints.append(last)

    def _read(self, index: int, request: Request, start: int) -> None:
        slot, size = self.slots[index], self.page_size
        assert slot is not None and slot.request is request, "the slot is another request's"
        prints = slot.prints
        assert start == len(prints) or (start < len(prints) and self.max_tokens_per_row > 1), "a gap or a repetition"
        for group, tables, pages in zip(self.groups, self.tables, self.pages, strict=True):
            table = tables[index]
            first = 0 if group.window is None else max(0, start - group.window + 1)
            while first < start:
                page, offset = divmod(first, size)
                stop = min(start, first - offset + size)
                read = pages[table[page]][offset : offset + stop - first]
                assert read == prints[first:stop], f"{request.id} reads foreign or missing keys at {first}:{stop}"
                first = stop

    def _write(self, index: int, slot: Slot, start: int, end: int) -> None:
        del slot.prints[start:]
        self._extend_prints(slot, end)
        size, prints = self.page_size, slot.prints
        for tables, pages in zip(self.tables, self.pages, strict=True):
            table = tables[index]
            for position in range(start, end):
                page = table[position // size]
                assert page, "a write without a page"
                pages[page][position % size] = prints[position]


@dataclasses.dataclass(frozen=True)
class Case:
    """What stays the same through a simulation. `depth`: launched steps that are left unread; 1 is the engine's way."""

    groups: tuple[CacheGroup, ...]
    config: SchedulerConfig
    depth: int = 1
    max_tokens_per_row: int = 1
    prefix_caching: bool = True
    weak_hash: bool = False  # nearly everything collides

    @staticmethod
    def draw(rng: random.Random) -> "Case":
        page_size = rng.choice([1, 2, 3, 4, 4, 8])
        max_model_len = rng.randint(12, 48)
        num_seqs = rng.randint(1, 8)
        most = -(-max_model_len // page_size)

        def group(name: str, window: int | None) -> CacheGroup:
            need = most if window is None else min(most, -(-(window - 1) // page_size) + 1)
            return CacheGroup(name, 1 + max(1, need + rng.randint(-1, 2 * most)), page_size, window)

        kinds: list[int | None] = rng.choice([[None], [None], [None, 5], [None, 9], [7], [None, 1, 6]])
        budget = num_seqs + rng.randint(0, 24)
        config = SchedulerConfig(
            max_num_seqs=num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            policy=rng.choice(["fcfs", "fcfs", "priority"]),
            token_rungs=tuple(sorted({budget, *(rung for rung in (2, 4, 8, 16) if rung < budget)})),
            weight_bound_tokens=rng.choice([1, 4, 100]),
            max_waiting_requests=rng.choice([None, 12]),
            max_waiting_tokens=rng.choice([None, 200]),
        )
        return Case(
            groups=tuple(group(str(i), window) for i, window in enumerate(kinds)),
            config=config,
            depth=(depth := rng.choice([0, 1, 1, 1, 2, 3])),
            max_tokens_per_row=rng.choice([1, 1, 3]) if depth < 2 else 1,
            prefix_caching=rng.random() < 0.75,
            weak_hash=rng.random() < 0.2,
        )


class Simulation:
    """Drives a scheduler against the device and checks what it hands out and takes in."""

    def __init__(self, case: Case):
        self.case, config = case, case.config
        weak = (lambda parent, content: hash_page(parent, content)[:1]) if case.weak_hash else hash_page
        self.cache = KVCache(case.groups, case.prefix_caching, weak)
        self.scheduler = Scheduler(config, self.cache)
        self.device = Device(case.groups, config.max_num_seqs, config.max_model_len, case.max_tokens_per_row)
        self.in_flight: deque[tuple[Batch, list[list[int]]]] = deque()
        self.alive: dict[str, Request] = {}
        self.deadlines: dict[str, int] = {}
        self.begun: set[str] = set()  # ids of requests that got tokens
        self.num_calls = 0  # of schedule
        self.num_steps = 0  # of these, with a batch
        self.num_ended = {status: 0 for status in Status if status.ended}
        self.bounded_wait = config.policy == "fcfs"
        self._ids = 0

    # What comes from outside

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        seed: int,
        *,
        num_emitted: int = 0,
        stops: frozenset[int] = frozenset({0, 1}),
        leader: str | None = None,
        priority: int = 0,
        salt: str = "",
        adapter: str | None = None,
        prompt_logprobs: bool = False,
    ) -> str | None:
        """Submits a request, if need be with tokens already emitted; None if it was refused, as it then had to be."""
        emitted = [sample(seed, len(prompt) + i) for i in range(min(num_emitted, max_tokens - 1))]
        emitted = next((emitted[:i] for i, token in enumerate(emitted) if token in stops), emitted)
        self._ids += 1
        request = Request(
            id=str(self._ids),
            tokens=prompt + emitted,
            num_prompt_tokens=len(prompt),
            params=PROMPT_LOGPROBS if prompt_logprobs else PLAIN,
            max_tokens=max_tokens,
            stop_token_ids=stops,
            seed=seed,
            priority=priority,
            arrival=float(self.num_calls),
            cache_salt=salt,
            adapter=adapter,
            leader=leader,
        )
        config = self.case.config
        limit = min(len(prompt) + max_tokens, config.max_model_len)
        if self._ids % 2:
            self.cache.name_pages(request)
        try:
            self.scheduler.add(request)
        except InvalidRequestError:
            assert len(request.tokens) >= config.max_model_len or self.cache.unfit(limit - 1), "wrongly refused"
            return None
        except QueueFullError:
            assert self.scheduler.num_waiting, "an empty queue is never full"
            return None
        longest = config.max_model_len * (self.case.depth + 1) + 10
        self.deadlines[request.id] = self.num_calls + (len(self.alive) + config.max_num_seqs + 2) * longest
        self.alive[request.id] = request
        return request.id

    def stop(self, request_id: str, status: Status) -> None:
        update = self.scheduler.finish_request(request_id, status)
        assert (update is None) == (request_id not in self.alive)
        if update is not None:
            self._take(update)

    def reset_prefix_cache(self) -> None:
        """New weights."""
        self.cache.reset_prefix_cache()
        self.device.weights += 1

    def lose_device_state(self) -> None:
        self.in_flight.clear()
        self.device.wipe()
        self.scheduler.recompute_all()
        self.bounded_wait = False

    # Steps

    def launch(self) -> bool:
        self.num_calls += 1
        batch = self.scheduler.schedule(float(self.num_calls))
        if batch is None:
            assert self.in_flight or not self.alive, "stuck: work, but nothing to launch or to wait for"
            return False
        self.num_steps += 1
        self._check_batch(batch)
        self.in_flight.append((batch, self.device.run(batch)))
        return True

    def finish(self) -> None:
        batch, results = self.in_flight.popleft()
        tokens: list[int | list[int]] = list(results)
        if self.num_steps % 2:  # both ways to say that it is one
            tokens = [new[0] if len(new) == 1 else new for new in results]
        progress = self.scheduler.finish(batch, tokens)
        for request, token in zip(progress.requests, progress.tokens, strict=True):
            assert self.alive[request.id] is request and not request.status.ended and request.tokens[-1] == token
            assert request.id in self.begun, "its first tokens say more"
        for update in progress.updates:
            self._take(update)
            self.begun.add(update.request.id)

    def step(self) -> None:
        """The engine's loop: launch, then read what has been in flight for long enough."""
        while len(self.in_flight) > self.case.depth:
            self.finish()
        launched = self.launch()
        if self.in_flight and (not launched or len(self.in_flight) > self.case.depth):
            self.finish()

    def drain(self) -> None:
        config = self.case.config
        calls = (len(self.alive) + 2) * (config.max_model_len * (self.case.depth + 1) + 10)
        while self.alive or self.in_flight:
            self.step()
            calls -= 1
            assert calls, "starved"
        self.check_idle()

    # Checks

    def _check_batch(self, batch: Batch) -> None:
        config, rows = self.case.config, batch.rows
        lengths = [row.length for row in rows]
        assert batch.num_tokens == sum(lengths) <= config.max_num_batched_tokens
        assert min(lengths) >= 1 and all(length > 1 for length in lengths[lengths.count(1) :]), "single rows come first"
        assert len({row.slot for row in rows}) == len(rows) <= config.max_num_seqs, "two rows of a slot"
        fed = [row.length == 1 and row.samples and row.start >= len(row.request.tokens) for row in rows]
        assert all(fed[: batch.num_fed]) and not any(fed[batch.num_fed :]), "rows that the device feeds come first"
        for row in rows:
            request = row.request
            assert self.alive.get(request.id) is request and request.slot == row.slot
            assert row.start + row.length < request.limit, "computes a token beyond the last one needed"
        for i in batch.new_slots:
            if rows[i].request.params is PROMPT_LOGPROBS:
                assert rows[i].start == 0, "prompt logprobs need the whole prompt computed"

    def _take(self, update: Update) -> None:
        request = self.alive[update.request.id]
        assert update.request is request and update.status is request.status
        new, prompt_length = update.new_tokens, request.num_prompt_tokens
        assert not new or request.tokens[-len(new) :] == new
        if not update.ended:
            return
        output = request.tokens[prompt_length:]
        expected = [sample(request.seed, prompt_length + i) for i in range(len(output))]
        assert output == expected, "lost, repeated or reordered tokens"
        assert not any(token in request.stop_token_ids for token in output[:-1]), "went on after a stop token"
        if update.status is Status.LENGTH:
            assert len(request.tokens) == request.limit and output[-1] not in request.stop_token_ids
        if update.status is Status.STOPPED and new:
            assert request.stop_token == output[-1] and request.stop_token in request.stop_token_ids
        assert not self.bounded_wait or self.num_calls <= self.deadlines[request.id], "waited too long"
        self.num_ended[update.status] += 1
        del self.alive[request.id], self.deadlines[request.id]

    def check(self) -> None:
        self.scheduler.check()
        assert self.scheduler.requests.keys() == self.alive.keys()

    def check_idle(self) -> None:
        self.check()
        assert not self.scheduler.has_work
        assert self.cache.num_used_pages == [0] * len(self.case.groups), "pages leak"
        if not self.case.prefix_caching:
            assert all(pool.num_cached == 0 for pool in self.cache.pools)

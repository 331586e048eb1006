from typing import Any

import pytest

from jaxllm.core.batch import Batch
from jaxllm.core.kv_cache import CacheGroup, KVCache
from jaxllm.core.request import Request, Status
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.core.scheduler import Scheduler, SchedulerConfig, Update
from jaxllm.errors import ConfigError, InvalidRequestError, QueueFullError

STOP = 1


def make(
    pages: int = 100, page_size: int = 4, window: int | None = None, caching: bool = True, **config: Any
) -> Scheduler:
    options: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64} | config
    groups = [CacheGroup("full", pages + 1, page_size)]
    if window is not None:
        groups.append(CacheGroup("window", pages + 1, page_size, window))
    return Scheduler(SchedulerConfig(**options), KVCache(groups, caching))


def request(id: str, prompt: int | list[int] = 5, max_tokens: int = 10, **fields: Any) -> Request:
    tokens = [100 + ord(id[0]) * 100 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    num_prompt_tokens = fields.pop("num_prompt_tokens", len(tokens))
    params = fields.pop("params", SamplingParams())
    return Request(id, tokens, num_prompt_tokens, params, max_tokens, frozenset({STOP}), 0, **fields)


def rows(batch: Batch | None) -> list[tuple[str, int, int, bool]]:
    return [(r.request.id, r.start, r.length, r.samples) for r in batch.rows] if batch else []


def finish(scheduler: Scheduler, batch: Batch | None, token: int = 9) -> dict[str, Update]:
    assert batch is not None
    progress = scheduler.finish(batch, [token if row.samples else [] for row in batch.rows])
    scheduler.check()
    plain = {r.id: Update(r, [t], r.status) for r, t in zip(progress.requests, progress.tokens, strict=True)}
    return plain | {update.request.id: update for update in progress.updates}


def step(scheduler: Scheduler, token: int = 9) -> list[tuple[str, int, int, bool]]:
    batch = scheduler.schedule(0.0)
    finish(scheduler, batch, token)
    return rows(batch)


def add(scheduler: Scheduler, *requests: Request) -> tuple[Request, ...]:
    for each in requests:
        scheduler.add(each)
    return requests


# The one rule


def test_computed_tokens_catch_up_under_the_budget() -> None:
    scheduler = make()
    add(scheduler, request("a", 5), request("b", 30))
    batch = scheduler.schedule(0.0)
    assert rows(batch) == [("a", 0, 5, True), ("b", 0, 11, False)]
    assert batch is not None and batch.new_slots == [0, 1] and batch.num_tokens == 16
    assert {(slot, index) for slot, index, _ in batch.page_updates[0]} == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}
    assert finish(scheduler, batch)["a"].new_tokens == [9]
    assert step(scheduler) == [("a", 5, 1, True), ("b", 11, 15, False)]
    assert step(scheduler) == [("a", 6, 1, True), ("b", 26, 4, True)]
    assert step(scheduler) == [("a", 7, 1, True), ("b", 30, 1, True)]


def test_only_new_pages_are_told() -> None:
    scheduler = make()
    scheduler.add(request("a", 3))
    told = []
    for _ in range(6):
        batch = scheduler.schedule(0.0)
        assert batch is not None
        told.append([index for _, index, _ in batch.page_updates[0]])
        finish(scheduler, batch)
    assert told == [[0], [], [1], [], [], []]


def test_rows_of_one_token_stand_first() -> None:
    scheduler = make()
    scheduler.add(request("a", 20))
    step(scheduler)
    scheduler.add(request("b", 1))
    batch = scheduler.schedule(0.0)
    assert rows(batch) == [("b", 0, 1, True), ("a", 16, 4, True)]
    assert batch is not None and batch.new_slots == [0]


def test_a_chunk_leaves_a_token_for_each_running_request_behind_it() -> None:
    scheduler = make(max_num_batched_tokens=6)
    add(scheduler, request("a", 40, arrival=1), request("b", 2), request("c", 2))
    for _ in range(2):
        step(scheduler)
    assert step(scheduler) == [("b", 3, 1, True), ("c", 3, 1, True), ("a", 6, 4, False)]
    scheduler = make(max_num_batched_tokens=6)
    add(scheduler, request("b", 2), request("c", 2, max_tokens=20))
    step(scheduler)
    scheduler.add(request("a", 40, arrival=-1))
    step(scheduler)
    assert step(scheduler) == [("b", 3, 1, True), ("c", 3, 1, True), ("a", 4, 4, False)]


def test_a_resumed_request_goes_on() -> None:
    scheduler = make()
    a, *_ = add(scheduler, request("a", [5, 6, 7, 8, 9], max_tokens=4, num_prompt_tokens=3))
    assert step(scheduler) == [("a", 0, 5, True)]
    batch = scheduler.schedule(0.0)
    assert finish(scheduler, batch)["a"].status is Status.LENGTH
    assert a.tokens == [5, 6, 7, 8, 9, 9, 9] and a.num_output_tokens == 4 and not scheduler.has_work


# Ends


def test_nothing_is_scheduled_beyond_the_last_token() -> None:
    scheduler = make()
    a, *_ = add(scheduler, request("a", 5, max_tokens=2))
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    assert rows(second) == [("a", 5, 1, True)]
    assert scheduler.schedule(0.0) is None
    assert not finish(scheduler, first)["a"].ended
    assert finish(scheduler, second)["a"] == Update(a, [9], Status.LENGTH)
    scheduler = make(max_model_len=6)
    scheduler.add(request("a", 5, max_tokens=10))
    assert finish(scheduler, scheduler.schedule(0.0))["a"].status is Status.LENGTH


def test_a_stop_token_is_found_a_step_late_and_the_wasted_row_dropped() -> None:
    scheduler = make()
    a, *_ = add(scheduler, request("a", 5))
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    assert finish(scheduler, first, STOP)["a"] == Update(a, [STOP], Status.STOPPED)
    assert a.stop_token == STOP and scheduler.has_work
    assert scheduler.schedule(0.0) is None
    assert finish(scheduler, second) == {} and not scheduler.has_work
    assert a.tokens[5:] == [STOP]


def test_several_tokens_end_at_the_first_stop_token_or_at_the_limit() -> None:
    scheduler = make()
    a, b, c = add(scheduler, request("a", 3), request("b", 3, max_tokens=2), request("c", 3))
    batch = scheduler.schedule(0.0)
    assert batch is not None
    progress = scheduler.finish(batch, [[7, STOP, 8], [7, 7, 7], [7, 7, 7]])
    assert progress.updates == [
        Update(a, [7, STOP], Status.STOPPED),
        Update(b, [7, 7], Status.LENGTH),
        Update(c, [7, 7, 7], Status.RUNNING),
    ]
    assert step(scheduler) == [("c", 3, 3, True)]


def test_several_tokens_under_overlap() -> None:
    """The next step's row falls short of the history, brings nothing, and the one after it was counted too long."""
    scheduler = make()
    a, *_ = add(scheduler, request("a", 3))
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    assert first is not None and second is not None
    scheduler.finish(first, [[7, 7, 7]])
    third = scheduler.schedule(0.0)
    assert third is not None and rows(third) == [("a", 4, 3, True)]  # token 6 is counted on, but will not come
    scheduler.finish(second, [[]])
    assert a.num_computed == 6 and a.num_tokens == 7
    fourth = scheduler.schedule(0.0)
    assert rows(fourth) == [("a", 6, 1, True)]
    scheduler.finish(third, [[7]])
    assert len(a.tokens) == 7
    scheduler.check()


def test_abort_and_ends_from_outside_tolerate_launched_steps() -> None:
    scheduler = make()
    a, b, c = add(scheduler, request("a", 5), request("b", 5), request("c", 7))
    batch = scheduler.schedule(0.0)
    update = scheduler.abort("a")
    assert update is not None and update.status is Status.ABORTED and a.slot == -1
    assert scheduler.finish_request("b", Status.STOPPED) == Update(b, [], Status.STOPPED)
    assert scheduler.abort("a") is None
    scheduler.check()
    scheduler.add(request("a", 5))  # the id is free again
    assert finish(scheduler, batch) == {} and len(a.tokens) == 5
    assert step(scheduler) == [("c", 6, 1, True), ("a", 0, 5, True)]


def test_finish_takes_batches_in_order() -> None:
    scheduler = make()
    scheduler.add(request("a"))
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    assert first is not None and second is not None
    with pytest.raises(ValueError, match="oldest"):
        scheduler.finish(second, [[9]])
    with pytest.raises(ValueError, match="for each row"):
        scheduler.finish(first, [])
    finish(scheduler, first)


# Refusals


@pytest.mark.parametrize(
    "bad,field",
    [
        (request("a", []), "num_prompt_tokens"),
        (request("a", 64), "number of tokens"),
        (request("a", [5, 6, 7], max_tokens=2, num_prompt_tokens=1), "max_tokens"),
        (request("a", 30, max_tokens=60), "max_tokens"),
        (request("live"), "id"),
    ],
)
def test_what_can_never_run_is_refused(bad: Request, field: str) -> None:
    scheduler = make(pages=15)
    scheduler.add(request("live"))
    with pytest.raises(InvalidRequestError) as error:
        scheduler.add(bad)
    assert error.value.field == field
    scheduler.check()
    assert scheduler.num_waiting == 1


def test_the_queue_is_bounded() -> None:
    scheduler = make(max_waiting_requests=2)
    add(scheduler, request("a"), request("b"))
    with pytest.raises(QueueFullError, match="max_waiting_requests=2"):
        scheduler.add(request("c"))
    step(scheduler)
    scheduler.add(request("c"))
    scheduler = make(max_waiting_tokens=10)
    scheduler.add(request("a", 40))
    with pytest.raises(QueueFullError, match="40 prompt tokens wait and 1 more came, max_waiting_tokens=10"):
        scheduler.add(request("b", 1))


@pytest.mark.parametrize(
    "bad",
    [
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": 3},
        {"max_model_len": 1},
        {"policy": "lifo"},
        {"token_rungs": (8, 4, 16)},
        {"token_rungs": (4, 8)},
    ],
)
def test_the_configuration_is_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        make(**bad)


def test_aborted_waiting_requests_do_not_pile_up() -> None:
    scheduler = make(max_num_seqs=1)
    scheduler.add(request("live", 5, max_tokens=50))
    step(scheduler)
    for i in range(1000):
        scheduler.add(request(f"w{i}"))
        scheduler.abort(f"w{i}")
    assert len(scheduler._waiting._heap) < 100


# Who runs, who gives way


def test_who_lacks_pages_waits_if_he_is_the_worst_and_else_takes_them_from_the_worst() -> None:
    scheduler = make(pages=5, caching=False)
    a, b = add(scheduler, request("a", 5, max_tokens=12), request("b", 5, max_tokens=8))
    scheduled = []
    pending = scheduler.schedule(0.0)
    while scheduler.has_work:
        batch = scheduler.schedule(0.0)
        if pending is not None:
            finish(scheduler, pending)
        scheduled.append({id: start for id, start, *_ in rows(batch)})
        pending = batch
    both = [{"a": start, "b": start} for start in (5, 6, 7)]
    a_alone = [{"a": start} for start in range(8, 16)]  # at 8 it takes the last page, at 12 those of b
    assert scheduled[:12] == [*both, *a_alone, {}]
    assert scheduled[12] == {"b": 0}
    assert (a.num_preemptions, b.num_preemptions, scheduler.num_preemptions) == (0, 1, 1)
    assert a.status is b.status is Status.LENGTH and b.num_output_tokens == 8


def test_a_preempted_request_waits_for_its_pending_token() -> None:
    scheduler = make(caching=False)
    a, b = add(scheduler, request("a", 5), request("b", 5))
    pending = scheduler.schedule(0.0)
    scheduler._preempt_worst()
    scheduler.check()
    assert rows(scheduler.schedule(0.0)) == [("a", 5, 1, True)]
    assert finish(scheduler, pending)["b"] == Update(b, [9], Status.WAITING)
    assert ("b", 0, 6, True) in rows(scheduler.schedule(0.0))


def test_nobody_is_preempted_for_one_worse_than_himself() -> None:
    scheduler = make(pages=4, caching=False)
    a, b = add(scheduler, request("a", 8, max_tokens=2), request("b", 7, max_tokens=9))
    step(scheduler)
    step(scheduler)  # a has ended
    add(scheduler, request("c", 3, max_tokens=9))
    for _ in range(3):
        step(scheduler)
    assert b.num_preemptions == 0


def test_priority_overtakes_and_preempts() -> None:
    scheduler = make(max_num_seqs=1, policy="priority")
    low, high = request("l", 5, priority=1), request("h", 5, priority=0)
    scheduler.add(low)
    step(scheduler)
    scheduler.add(high)
    scheduler.add(request("m", 5, priority=1))
    assert step(scheduler) == [("h", 0, 5, True)]
    assert low.status is Status.WAITING and low.num_preemptions == 1
    while not high.status.ended:
        step(scheduler)
    assert step(scheduler)[0][:2] == ("l", 4)  # before m, and with its cached page
    same = request("s", 5, priority=1)
    scheduler.add(same)
    step(scheduler)
    assert low.status is Status.RUNNING and same.status is Status.WAITING


def test_priority_does_not_preempt_in_vain() -> None:
    scheduler = make(pages=8, policy="priority", caching=False)
    add(scheduler, request("a", 16, priority=0, max_tokens=9), request("l", 5, priority=2, max_tokens=3))
    step(scheduler)
    step(scheduler)
    scheduler.add(request("h", 25, priority=1, max_tokens=3))  # needs 7 pages; without l there are 3
    step(scheduler)
    assert scheduler.num_preemptions == 0


def test_waiting_requests_are_admitted_strictly_in_order() -> None:
    scheduler = make(pages=8, caching=False)
    add(scheduler, request("a", 16, max_tokens=9))
    step(scheduler)
    add(scheduler, request("b", 24, max_tokens=3), request("c", 1, max_tokens=3))
    assert [id for id, *_ in step(scheduler)] == ["a"]


# Prefixes


def test_a_prefix_is_shared_and_counted() -> None:
    scheduler = make()
    tokens = list(range(10, 23))
    add(scheduler, request("a", list(tokens), max_tokens=1))
    step(scheduler)
    b, *_ = add(scheduler, request("b", [*tokens, 99]))
    assert step(scheduler) == [("b", 12, 2, True)]
    assert (b.num_cached, scheduler.kv_cache.num_hit_tokens, scheduler.kv_cache.num_queried_tokens) == (12, 12, 27)
    scheduler.add(request("c", list(tokens), params=SamplingParams(prompt_logprobs=0)))
    assert ("c", 0, 13, True) in step(scheduler)


def test_pages_of_a_failed_request_are_not_found() -> None:
    scheduler = make()
    tokens = list(range(10, 23))
    add(scheduler, request("a", list(tokens)))
    step(scheduler)
    scheduler.finish_request("a", Status.ERROR)
    scheduler.check()
    scheduler.add(request("b", list(tokens)))
    assert step(scheduler) == [("b", 0, 13, True)]


def test_pages_are_found_only_once_their_step_is_finished() -> None:
    scheduler = make()
    tokens = list(range(10, 18))
    add(scheduler, request("a", [*tokens, 1]))
    first = scheduler.schedule(0.0)
    add(scheduler, request("b", [*tokens, 2]))
    second = scheduler.schedule(0.0)
    assert ("b", 0, 9, True) in rows(second)
    finish(scheduler, first)
    add(scheduler, request("c", [*tokens, 3]))
    assert ("c", 8, 1, True) in rows(scheduler.schedule(0.0))


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("window", [None, 6])
def test_followers_wait_for_their_leaders_pages_and_share_them(caching: bool, window: int | None) -> None:
    scheduler = make(caching=caching, window=window)
    tokens = list(range(10, 28))  # more than a step's budget
    a, b, c = add(scheduler, *(request(id, list(tokens), leader="a") for id in "abc"))
    assert step(scheduler) == [("a", 0, 16, False)]
    assert step(scheduler) == [("a", 16, 2, True), ("b", 16, 2, True), ("c", 16, 2, True)]
    assert a.pages is not None and b.pages is not None and c.pages is not None
    assert a.pages.tables[0][:4] == b.pages.tables[0][:4] == c.pages.tables[0][:4]
    scheduler.abort("a")
    scheduler.check()
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.kv_cache.num_used_pages == [0] * len(scheduler.kv_cache.groups)


def test_a_follower_whose_leader_is_gone_computes() -> None:
    scheduler = make(caching=False)
    tokens = list(range(10, 28))
    a, b = add(scheduler, request("a", list(tokens)), request("b", list(tokens), leader="a"))
    step(scheduler)
    scheduler.abort("a")
    assert step(scheduler) == [("b", 0, 16, False)]
    scheduler.add(request("c", list(tokens), leader="nobody"))
    assert ("c", 0, 14, False) in step(scheduler)


def test_a_leader_that_starts_from_a_full_hit_wakes_its_followers_at_once() -> None:
    scheduler = make()
    tokens = list(range(10, 19))
    add(scheduler, request("x", list(tokens), max_tokens=1))
    step(scheduler)
    add(scheduler, request("a", list(tokens)), request("b", list(tokens), leader="a"))
    assert step(scheduler) == [("a", 8, 1, True), ("b", 8, 1, True)]


# Rungs


@pytest.mark.parametrize(
    "prompt,lengths",
    [
        (32, [32]),
        (34, [32, 2]),  # pads 62 or puts off 2
        (47, [32, 15]),  # half the chunk is kept, and the padding is at least the excess
        (49, [49]),  # pads 15, would put off 17
        (17, [17]),  # below weight_bound_tokens: the smaller step is no cheaper
    ],
)
def test_chunks_are_cut_to_a_rung_where_that_saves(prompt: int, lengths: list[int]) -> None:
    scheduler = make(max_num_batched_tokens=64, token_rungs=(8, 16, 32, 64), weight_bound_tokens=20)
    a, *_ = add(scheduler, request("a", prompt))
    got = []
    while not a.num_output_tokens:
        got.append(step(scheduler)[0])
    assert [length for _, _, length, _ in got] == lengths
    assert [samples for *_, samples in got] == [False] * (len(got) - 1) + [True]


def test_a_chunk_is_not_cut_below_half() -> None:
    scheduler = make(max_num_batched_tokens=16, token_rungs=(4, 16), weight_bound_tokens=1)
    add(scheduler, request("a", 1), request("b", 1), request("c", 1))
    step(scheduler)
    scheduler.add(request("d", 2))
    assert step(scheduler)[-1] == ("d", 0, 1, False)
    scheduler.add(request("a2", 1))
    assert step(scheduler)[-1] == ("d", 1, 1, True)


# After a failed step


def test_restricted_to_some_the_others_wait() -> None:
    scheduler = make()
    a, b, c = add(scheduler, request("a", 5), request("b", 5), request("c", 5))
    step(scheduler)
    scheduler.recompute_all()
    scheduler.restrict({b})
    scheduler.check()
    assert step(scheduler) == [("b", 0, 6, True)]
    (d,) = add(scheduler, request("d", 3))
    follower = request("e", 5, leader="b")
    scheduler.add(follower)
    assert step(scheduler) == [("b", 6, 1, True)]
    scheduler.abort("c")
    scheduler.restrict({a})
    scheduler.check()
    assert step(scheduler) == [("b", 7, 1, True), ("a", 0, 6, True)]
    scheduler.restrict(None)
    scheduler.check()
    assert {id for id, *_ in step(scheduler)} == {"a", "b", "d", "e"}


def test_recompute_all_starts_over_from_the_known_tokens() -> None:
    scheduler = make()
    a, b = add(scheduler, request("a", 5), request("b", 40))
    step(scheduler)
    lost = scheduler.schedule(0.0)
    scheduler.recompute_all()
    scheduler.check()
    assert lost is not None
    with pytest.raises(ValueError):
        scheduler.finish(lost, [[9], []])
    assert step(scheduler) == [("a", 0, 6, True), ("b", 0, 10, False)]

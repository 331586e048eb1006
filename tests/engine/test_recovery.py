"""A step that raises ends the request that makes it raise; the others get what they would have got without it."""

import weakref
from collections.abc import Callable

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.core.batch import Batch
from jaxllm.core.request import Request, Status
from jaxllm.engine.recovery import GOOD_STEPS, MAX_FRUITLESS, MAX_LONE_FAILURES, CulpritSearch
from jaxllm.errors import EngineDeadError
from tests.engine import tiny

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
BAD = 299  # a prompt that begins with this token makes its steps raise


@pytest.fixture
def own(checkpoint):
    with tiny.llm(checkpoint("llama")) as llm:
        yield llm


def is_bad(request: Request) -> bool:
    return request.tokens[0] == BAD


def break_steps(llm: LLM, monkeypatch, where: str, faulty: Callable[[Batch], bool]) -> list[int]:
    """Steps with a faulty batch raise when launched or read, and take the caches with them; how many rows they had."""
    runner, failed = llm._client._core.runner, []  # type: ignore[attr-defined]
    original = getattr(runner, where)

    def broken(first, *rest):
        batches = first if where == "launch" else first.batches
        if any(batch is not None and faulty(batch) for batch in batches):
            failed.append(sum(len(batch.rows) for batch in batches if batch))
            for array in runner.device.caches:
                array.delete()
            raise RuntimeError("the device says no")
        return original(first, *rest)

    monkeypatch.setattr(runner, where, broken)
    return failed


@pytest.mark.parametrize(
    ("where", "culprits"), [("launch", (0,)), ("read", (23,)), ("launch", (3, 11, 12, 19)), ("read", (3, 11, 12, 19))]
)
def test_only_the_culprits_end(own, truth, monkeypatch, where, culprits):
    work, alone = truth("llama")
    failed = break_steps(own, monkeypatch, where, lambda batch: any(is_bad(row.request) for row in batch.rows))
    prompts, params = [prompt for prompt, _ in work[:24]], [asked for _, asked in work[:24]]
    for at in culprits:
        prompts[at] = [BAD, *prompts[at]]
        params[at] = GREEDY
    outputs = own.generate(prompts, params)
    for i, output in enumerate(outputs):
        sample = output.outputs[0]
        if i in culprits:
            assert (sample.token_ids, sample.finish_reason) == ([], "error")
        else:
            expected = alone[i].outputs[0]
            assert (sample.token_ids, sample.finish_reason) == (expected.token_ids, expected.finish_reason), i
            assert [list(entry) for entry in sample.logprobs or []] == [
                list(entry) for entry in expected.logprobs or []
            ]
    assert len(culprits) <= len(failed) <= len(culprits) * 7
    stats = own.stats()
    assert stats["running"] == stats["waiting"] == stats["cache_usage"] == 0
    core = own._client._core
    assert core._search.trial is None
    for scheduler in core.schedulers:
        scheduler.check()


def test_streams_go_on_and_new_requests_come_in(own, monkeypatch):
    expected = [own.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in ([8, 9], [7, 7, 7])]
    failed = break_steps(own, monkeypatch, "read", lambda batch: any(is_bad(row.request) for row in batch.rows))
    beside = own.stream([8, 9], GREEDY)
    tokens = list(next(beside).token_ids)
    broken = own.stream([BAD, 5], GREEDY)
    assert [delta.finish_reason for delta in broken] == ["error"] and failed
    assert own.generate([7, 7, 7], GREEDY)[0].outputs[0].token_ids == expected[1]
    tokens += [token for delta in beside for token in delta.token_ids]
    assert tokens == expected[0]


def test_samples_of_one_prompt_all_end(own, monkeypatch):
    break_steps(own, monkeypatch, "launch", lambda batch: any(is_bad(row.request) for row in batch.rows))
    four = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=4, ignore_eos=True)
    broken, fine = own.generate([[BAD] * 20, [5, 6, 7]], [four, GREEDY])
    assert [sample.finish_reason for sample in broken.outputs] == ["error"] * 4
    assert len(fine.outputs[0].token_ids) == 10


def test_a_trial_whose_requests_are_aborted_holds_nobody_up(own, monkeypatch):
    break_steps(own, monkeypatch, "launch", lambda batch: any(is_bad(row.request) for row in batch.rows))
    search = own._client._core._search
    prompts = [[BAD if i == 5 else 5, 6 + i] for i in range(8)]
    collectors = [own._submit(own._builder.build(prompt, GREEDY)) for prompt in prompts]
    while not search.trial:
        own._receive()
    in_trial = {request.id for request in search.trial}
    withdrawn = [collector for collector in collectors if in_trial & set(collector.sequence_ids)]
    assert 0 < len(withdrawn) < len(collectors)
    own._withdraw(withdrawn)
    others = [collector for collector in collectors if collector not in withdrawn]
    while not all(collector.output.finished for collector in others):
        own._receive()
    reasons = [collector.output.outputs[0].finish_reason for collector in others]
    assert sorted(reasons) == ["error", *["length"] * (len(others) - 1)]
    while own.stats()["running"]:
        own._receive()
    assert own.stats()["waiting"] == 0 and search.trial is None


def test_an_engine_that_always_fails_ends(own, monkeypatch):
    break_steps(own, monkeypatch, "launch", lambda batch: True)
    with pytest.raises(RuntimeError, match="the device says no"):
        own.generate([[5, 6, 7]] * (MAX_LONE_FAILURES + 2), GREEDY)
    with pytest.raises(EngineDeadError, match="the device says no"):
        own.generate([5, 6, 7], GREEDY)


def test_a_fault_that_no_request_brings_alone_ends_the_engine(own, monkeypatch):
    failed = break_steps(own, monkeypatch, "launch", lambda batch: len(batch.rows) > 4)
    with pytest.raises(RuntimeError, match="the device says no"):
        own.generate([[5, 6, 7]] * 8, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    assert MAX_FRUITLESS < len(failed) <= 3 * (MAX_FRUITLESS + 1)


def test_a_fault_that_passes_costs_nobody_anything(own, monkeypatch):
    expected = [output.outputs[0].token_ids for output in own.generate([[5, 6], [7], [8, 9, 10]], GREEDY)]
    seen = []

    def once(batch: Batch) -> bool:
        seen.append(batch)
        return len(seen) == 4

    failed = break_steps(own, monkeypatch, "read", once)
    outputs = own.generate([[5, 6], [7], [8, 9, 10]], GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == expected and len(failed) == 1


def test_the_old_caches_are_gone_before_the_new_ones_come(own, monkeypatch):
    """There is no room for both; the error must not keep them."""
    runner, left = own._client._core.runner, []
    reset, get = runner.device.reset, runner.executables.get

    def failing(leaves, caches, *rest):
        everything = list(caches)
        raise RuntimeError(f"the device says no to {len(everything)} caches")

    def broken(key):
        monkeypatch.setattr(runner.executables, "get", get)
        return failing

    def watched(self):
        before = [weakref.ref(array) for array in self.caches]
        self.caches = []
        left.append(sum(ref() is not None for ref in before))
        reset()

    own.generate([5, 6, 7], GREEDY)
    monkeypatch.setattr(type(runner.device), "reset", watched)
    monkeypatch.setattr(runner.executables, "get", broken)
    outputs = own.generate([[5, 6, 7], [8]], GREEDY)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [10, 10] and left == [0]


def test_a_device_that_is_gone_ends_the_engine(own, monkeypatch):
    break_steps(own, monkeypatch, "read", lambda batch: True)
    monkeypatch.setattr(own._client._core.runner.device, "reset", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        own.generate([5, 6, 7], GREEDY)


def some(count: int) -> list[Request]:
    return [Request(str(i), [1], 1, GREEDY, 5, frozenset(), 0) for i in range(count)]


@pytest.mark.parametrize("at", range(9))
def test_the_search_takes_few_steps(at):
    requests = some(9)
    search, tried = CulpritSearch(), 0
    assert not search.advance() and search.trial is None
    assert search.step_failed(requests) is None
    culprit = None
    while search.advance() and search.trial is not None:
        tried += 1
        assert culprit is None or culprit not in search.trial
        if requests[at] in search.trial:
            found = search.step_failed(search.trial)
            culprit = found or culprit
            if found:
                found.status = Status.ERROR
        else:
            search.step_passed()
            for request in search.trial:
                request.tokens.append(1)
    assert culprit is requests[at] and tried <= 8 and search.trial is None


def test_searches_long_ago_do_not_count():
    search = CulpritSearch()
    for _ in range(3 * MAX_FRUITLESS):
        requests = some(2)
        assert search.step_failed(requests) is None
        for request in requests:
            request.tokens.append(1)
        for turn in range(3):
            search.advance()
            for request in requests:
                request.tokens.append(1)
        assert search.trial is None
        for _ in range(GOOD_STEPS):
            search.step_passed()

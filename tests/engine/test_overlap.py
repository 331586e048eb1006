"""The fold over steps: the next one is launched before the last one is read; figures of what ran."""

import signal
import threading
import time

import pytest

from jaxllm import SamplingParams
from jaxllm.engine.executables import Forward
from jaxllm.errors import EngineDeadError
from tests.engine import tiny

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture
def own(checkpoint):
    with tiny.llm(checkpoint("llama")) as llm:
        yield llm


@pytest.fixture
def events(own, monkeypatch) -> list[tuple[str, int]]:
    """What the core asks of the runner: ("launch", n) and ("read", n) of the n-th step."""
    runner, seen, launched = own._client._core.runner, [], []
    launch, read = runner.launch, runner.read

    def recording_launch(*args):
        launched.append(launch(*args))
        seen.append(("launch", len(launched) - 1))
        return launched[-1]

    def recording_read(step):
        seen.append(("read", next(i for i, other in enumerate(launched) if other is step)))
        return read(step)

    monkeypatch.setattr(runner, "launch", recording_launch)
    monkeypatch.setattr(runner, "read", recording_read)
    return seen


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=1.0, seed=1, max_tokens=10, ignore_eos=True),
        SamplingParams(
            max_tokens=10, ignore_eos=True, presence_penalty=1.0, bad_words=["the"], logprobs=2, min_tokens=3
        ),
    ],
)
def test_each_step_is_launched_before_the_one_before_is_read(own, events, params):
    own.generate([[5, 6, 7], [8, 9]], params)
    expected = [("launch", 0)]
    for step in range(1, 10):
        expected += [("launch", step), ("read", step - 1)]
    assert events == [*expected, ("read", 9)]


def test_nothing_is_launched_for_a_request_whose_last_token_is_under_way(own, events):
    own.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=1))
    assert events == [("launch", 0), ("read", 0)]


def test_figures_of_steps_and_padding(own):
    executables = own._client._core.runner.executables  # ready, or else a step rounds up to a rung that is
    executables.prepare([Forward(4), Forward(32)])
    executables.wait()
    before = own.stats()
    own.generate([[5] * 6, [6] * 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    after = own.stats()
    found = {name: after[name] - before[name] for name in ("steps", "scheduled_tokens", "padded_tokens")}
    assert found == {"steps": 4, "scheduled_tokens": 9 + 3 * 2, "padded_tokens": 32 + 3 * 4}
    assert after["late_compilations"] == 0 and set(after) == set(before)


def test_stats_in_the_middle_of_a_stream_lose_nothing(own):
    expected = own.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    stream, found = own.stream([5, 6, 7], GREEDY), []
    for delta in stream:
        found += delta.token_ids
        assert own.stats()["running"] <= 1
    assert found == expected


@pytest.fixture
def ctrl_c():
    """Ctrl-C as a terminal's programs have it; those that a script starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["launch", "read"])
def test_ctrl_c_leaves_a_whole_engine(own, monkeypatch, where, ctrl_c):
    expected = own.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    beside = own.stream([8, 9], GREEDY)
    tokens = list(next(beside).token_ids)
    runner = own._client._core.runner
    original, calls = getattr(runner, where), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(runner, where, interrupted)
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(KeyboardInterrupt):
        own.generate([[5, 6, 7]] * 3, GREEDY)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert own.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids == expected
    tokens += [token for delta in beside for token in delta.token_ids]
    assert tokens == own.generate([8, 9], GREEDY)[0].outputs[0].token_ids
    assert own.stats()["running"] == own.stats()["waiting"] == 0


def test_a_scheduler_that_raises_ends_the_engine_for_good(own, monkeypatch):
    """What a request can bring about is another matter, see test_recovery.py."""
    stream = own.stream([8, 9], GREEDY)
    next(stream)
    monkeypatch.setattr(own._client._core.schedulers[0], "finish", lambda batch, tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        own.generate([5, 6, 7], GREEDY)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
            own.generate([5, 6, 7], GREEDY)
    with pytest.raises(EngineDeadError):
        list(stream)


def test_a_closed_engine_says_so(own):
    stream = own.stream([8, 9], GREEDY)
    next(stream)
    own.close()
    own.close()
    for use in (lambda: own.generate([5], GREEDY), own.stats, lambda: list(stream)):
        with pytest.raises(EngineDeadError, match="closed"):
            use()


def test_the_hosts_work_is_counted_without_its_waiting(own, monkeypatch):
    own.generate([5, 6, 7], GREEDY)
    device = own._client._core.runner.device
    read = device.read
    monkeypatch.setattr(device, "read", lambda *arrays: (time.sleep(0.05), read(*arrays))[1])
    sample = device.sample
    monkeypatch.setattr(device, "sample", lambda key: (time.sleep(0.01), sample(key))[1])
    before, begin = own.stats(), time.perf_counter()
    own.generate([5, 6, 7], GREEDY)
    after, passed = own.stats(), time.perf_counter() - begin
    worked, launching = (after[name] - before[name] for name in ("host_seconds", "launch_seconds"))
    assert 10 * 0.01 < launching < worked < passed - 10 * 0.05  # ten steps were launched and read


def test_a_rehearsal_runs_everything_and_changes_nothing(own):
    expected = own.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    runner = own._client._core.runner
    before = own.stats()
    stream = own.stream([5, 6, 7], GREEDY)  # its pages and lengths are on the device while the rehearsal runs
    found = list(next(stream).token_ids)
    runner.rehearse()
    found += [token for delta in stream for token in delta.token_ids]
    assert found == expected
    assert own.stats()["late_compilations"] == before["late_compilations"]

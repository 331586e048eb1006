"""Steps are lowered in turn, by this process and by others, to the same executables."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxllm import SamplingParams
from jaxllm.engine import build
from jaxllm.engine.executables import Forward, Pool
from jaxllm.engine.lowering_process import SharedLowering
from tests.engine import tiny

PROMPTS = ["the thing", "an error" * 5]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def lowering_of(llm) -> SharedLowering:
    return llm._client._core.runner.device._lowering


def tokens_of(llm) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def test_one_thread_traces_at_a_time(engine, monkeypatch):
    """Side by side under the GIL, the first would be done when the last is, and the compiler idle until then."""
    lowering, inside, most = lowering_of(engine()), [0], [0]

    def trace(key):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        inside[0] -= 1

    for name in ("_pool", "_forward"):
        monkeypatch.setattr(lowering, name, trace)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lowering, [Pool(), Forward(4)] * 8))
    assert most == [1]


def test_steps_of_another_process_give_the_same_tokens(checkpoint, engine, monkeypatch):
    """And every cache is donated still."""
    wanted = tokens_of(engine())

    class Elsewhere(SharedLowering):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._free.get()  # this process

    monkeypatch.setattr(build, "SharedLowering", Elsewhere)
    monkeypatch.setattr(build, "lowering_processes", lambda plan, threads: 1)
    with tiny.llm(checkpoint("llama")) as llm:
        assert tokens_of(llm) == wanted
        device = llm._client._core.runner.device
        device.executables.wait()
        steps = [key for key in device.executables.seconds if isinstance(key, Forward)]
        assert lowering_of(llm).num_shared == len(steps) >= 2
        for step in steps:
            aliased = device.executables.get(step).memory_analysis().alias_size_in_bytes
            assert aliased >= sum(cache.nbytes for cache in device.caches)


class FakeProcess:
    def __init__(self, answer):
        self.answer, self.closed = answer, threading.Event()
        self.close = self.closed.set

    def lower(self, key):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("answer", [EOFError(), BrokenPipeError(), "RuntimeError: of another kind"])
def test_what_another_process_fails_at_is_lowered_here(engine, answer):
    lowering, process = lowering_of(engine()), FakeProcess(answer)
    before = lowering.num_shared
    assert lowering._free.get() is None
    for place in (process, None):
        lowering._free.put(place)
    assert lowering(Forward(4)).as_text()
    places = {lowering._free.get() for _ in range(lowering._free.qsize())}
    assert places == ({None, process} if isinstance(answer, str) else {None})  # the dead are not asked again
    assert process.closed.is_set() != isinstance(answer, str)
    assert lowering.num_shared == before
    lowering._free.put(None)

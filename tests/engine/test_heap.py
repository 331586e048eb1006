"""The garbage collector while steps run: what was there before is left alone, and all is as before afterwards."""

import gc
import subprocess
import sys

import pytest

from jaxllm import SamplingParams
from jaxllm.engine import heap


@pytest.fixture(autouse=True)
def unchanged():
    before = gc.get_threshold(), gc.isenabled()
    yield
    gc.unfreeze()
    assert (gc.get_threshold(), gc.isenabled()) == before


def test_the_heap_is_frozen_for_a_while_only():
    threshold = gc.get_threshold()
    with heap.frozen():
        assert gc.get_freeze_count() > heap.INTERPRETERS_OWN
        assert gc.get_threshold() == heap.THRESHOLD
        with heap.frozen():
            pass
        assert gc.get_freeze_count() > heap.INTERPRETERS_OWN, "the inner one has thawed what it did not freeze"
    assert gc.get_freeze_count() < heap.INTERPRETERS_OWN and gc.get_threshold() == threshold
    with pytest.raises(KeyError), heap.frozen():
        raise KeyError
    assert gc.get_freeze_count() < heap.INTERPRETERS_OWN and gc.get_threshold() == threshold


def test_what_others_have_set_stays():
    gc.freeze()
    with heap.frozen():
        pass
    assert gc.get_freeze_count() > heap.INTERPRETERS_OWN
    gc.unfreeze()
    before = gc.get_threshold()
    try:
        for threshold in ((0, 10, 10), (100_000, 5, 50)):
            gc.set_threshold(*threshold)
            with heap.frozen():
                assert gc.get_threshold()[0] == threshold[0]
            assert gc.get_threshold() == threshold
    finally:
        gc.set_threshold(*before)


def test_generate_runs_frozen_and_thaws(engine, monkeypatch):
    llm = engine()
    frozen, receive = [], llm._client.receive

    def watching(timeout):
        frozen.append(gc.get_freeze_count() > heap.INTERPRETERS_OWN)
        return receive(timeout)

    monkeypatch.setattr(llm._client, "receive", watching)
    llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=3))
    assert frozen and all(frozen) and gc.get_freeze_count() < heap.INTERPRETERS_OWN


def test_a_process_of_the_engines_own_stays_frozen():
    code = "import gc; from jaxllm.engine import heap; heap.freeze(); print(gc.get_freeze_count(), *gc.get_threshold())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, *threshold = map(int, done.stdout.split())
    assert count > heap.INTERPRETERS_OWN and tuple(threshold) == heap.THRESHOLD

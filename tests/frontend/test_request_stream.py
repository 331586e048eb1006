"""What a coroutine reads of a request, however late it comes."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from jaxllm.errors import EngineDeadError
from jaxllm.frontend.outputs import CompletionOutput
from jaxllm.frontend.request_stream import RequestStream, wait_any


def stream() -> RequestStream:
    collector: Any = SimpleNamespace(output=SimpleNamespace(finished=False), error=None)
    return RequestStream(collector)


def delta(index: int, text: str, token: int, reason: str | None = None) -> CompletionOutput:
    return CompletionOutput(index, text, [token], finish_reason=reason)


def test_what_waits_is_one_delta_a_sample():
    one = stream()
    assert one.take() is None
    for item in (delta(0, "a", 1), delta(1, "x", 7), delta(0, "b", 2), delta(0, "", 3, "stop")):
        one.put(item)
    found = one.take()
    assert [(d.index, d.text, d.token_ids, d.finish_reason) for d in found] == [
        (0, "ab", [1, 2, 3], "stop"),
        (1, "x", [7], None),
    ]
    assert one.take() is None
    one.collector.output.finished = True
    assert one.take() == []


def test_an_error_comes_after_what_is_there():
    one = stream()
    one.put(delta(0, "a", 1))
    one.fail(EngineDeadError("gone"))
    assert one.take()[0].text == "a"
    with pytest.raises(EngineDeadError):
        one.take()


def test_waiting_ends_with_news_of_any_or_in_time():
    async def use():
        some = [stream() for _ in range(3)]
        waiting = asyncio.ensure_future(wait_any(some))
        await asyncio.sleep(0)
        some[2].put(delta(0, "a", 1))
        some[1].put(delta(0, "b", 1))  # the waiter has been woken already
        await asyncio.wait_for(waiting, 5)
        await wait_any(some)  # at once
        assert [one.ready for one in some] == [False, True, True]
        await wait_any(some[:1], 0.01)
        assert not some[0].ready

    asyncio.run(use())


def test_a_reader_that_is_cancelled_misses_nothing():
    async def use():
        one = stream()
        reading = asyncio.ensure_future(one.read())
        await asyncio.sleep(0)
        one.put(delta(0, "a", 1))
        reading.cancel()  # it was about to be woken
        with pytest.raises(asyncio.CancelledError):
            await reading
        one.put(delta(0, "b", 2))
        assert [d.text for d in await one.read()] == ["ab"]

    asyncio.run(use())

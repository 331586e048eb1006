"""AsyncLLM: many streams at once, slow readers, aborts, back-pressure, and an engine that dies."""

import asyncio
import dataclasses
import os
import random
import signal
import time

import pytest

from jaxllm import AsyncLLM, SamplingParams, StructuredOutputsParams
from jaxllm.errors import EngineDeadError, InvalidRequestError, JaxllmError, QueueFullError
from tests.engine import tiny

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


def serve(model: str, use, **options):
    """Runs `use(llm)` on an event loop of its own, with an engine in this process unless asked otherwise."""

    async def main():
        options.setdefault("engine_process", False)
        async with AsyncLLM(model, **{**tiny.OPTIONS, **options}) as llm:
            return await asyncio.wait_for(use(llm), timeout=60)

    return asyncio.run(main())


async def read(stream) -> tuple[list[int], str, str | None]:
    """All tokens, all text and the finish reason of a stream of deltas of one sample."""
    tokens, text, reason = [], "", None
    async for delta in stream:
        tokens, text, reason = tokens + delta.token_ids, text + delta.text, delta.finish_reason
    return tokens, text, reason


async def settled(llm: AsyncLLM) -> dict:
    """Figures once nothing runs any more."""
    while True:
        stats = await llm.stats()
        if not stats["running"] and not stats["waiting"]:
            return stats
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("engine_process", [False, True])
def test_64_streams_with_slow_readers_and_aborts(checkpoint, truth, engine_process):
    work, alone = truth("llama")
    rng = random.Random(0)

    async def one(llm, index: int) -> str:
        prompt, params = work[index % 32]
        expected = alone[index % 32].outputs[0]
        manner = rng.choice(["read", "slow", "complete", "abort", "leave", "cancel"])
        await asyncio.sleep(rng.random() * 0.1)
        if manner == "complete":
            output = await llm.complete(prompt, params)
            assert (output.outputs[0].token_ids, output.outputs[0].text) == (expected.token_ids, expected.text)
            assert output.finished and output.outputs[0].finish_reason == expected.finish_reason
            return manner
        if manner == "cancel":
            task = asyncio.create_task(read(llm.generate(prompt, params)))
            await asyncio.sleep(rng.random() * 0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return manner
        tokens, text, reason = [], "", None
        stream = llm.generate(prompt, params, request_id=f"own {index}")
        async for delta in stream:
            tokens, text, reason = tokens + delta.token_ids, text + delta.text, delta.finish_reason
            assert delta.token_ids or delta.text or delta.finished
            if manner == "slow":
                await asyncio.sleep(0.02)
            if manner == "abort":
                await llm.abort(f"own {index}")
            if manner == "leave" and len(tokens) >= 2:
                break
        if manner in ("read", "slow"):
            assert (tokens, text, reason) == (expected.token_ids, expected.text, expected.finish_reason)
        else:
            assert tokens == expected.token_ids[: len(tokens)]
            assert manner == "leave" or reason in ("abort", expected.finish_reason)
        return manner

    async def use(llm):
        manners = await asyncio.gather(*(one(llm, index) for index in range(64)))
        assert len(set(manners)) == 6
        stats = await settled(llm)
        assert stats["cache_usage"] == 0 and stats["steps"] > 20
        await asyncio.sleep(0)
        assert not llm._live and not llm._requests
        return llm

    llm = serve(checkpoint("llama"), use, engine_process=engine_process)
    llm._pump.join(timeout=5)
    assert not llm._pump.is_alive()
    if engine_process:
        with pytest.raises(ProcessLookupError):
            os.kill(llm._client.pid, 0)


def test_a_slow_reader_gets_what_it_missed_in_one_piece(checkpoint):
    async def use(llm):
        stream = llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, n=2, logprobs=1))
        first = await anext(stream)
        while (await llm.stats())["running"]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        rest = [delta async for delta in stream]
        assert len(rest) <= 3 and {delta.index for delta in rest} == {0, 1}  # one a sample, beside what was taken
        counts = {0: 0, 1: 0}
        for delta in [first, *rest]:
            counts[delta.index] += len(delta.token_ids)
            assert len(delta.logprobs) == len(delta.token_ids)
            values = [entry[token].logprob for token, entry in zip(delta.token_ids, delta.logprobs, strict=True)]
            assert delta.cumulative_logprob == pytest.approx(sum(values))
        assert counts == {0: 40, 1: 40}

    serve(checkpoint("llama"), use)


def test_tokens_of_several_steps_at_once_are_the_same(checkpoint, truth):
    """The loop is kept busy, so that it gets to know many steps at once: texts, stop strings and ends included."""
    work, alone = truth("llama")
    text = alone[0].outputs[0].text

    async def use(llm):
        stop = dataclasses.replace(work[0][1], stop=[text[3:5]])
        tasks = [asyncio.create_task(llm.complete(*request)) for request in [*work, (work[0][0], stop)]]
        while not all(task.done() for task in tasks):
            time.sleep(0.02)
            await asyncio.sleep(0)
        *outputs, stopped = [task.result() for task in tasks]
        for found, expected in zip(outputs, alone, strict=True):
            _same(found, expected)
        assert stopped.outputs[0].text == text[: text.index(text[3:5])] and stopped.outputs[0].finish_reason == "stop"
        assert len(stopped.outputs[0].token_ids) < len(alone[0].outputs[0].token_ids)

    serve(checkpoint("llama"), use, engine_process=True)


def test_leaving_early_aborts_within_a_step(checkpoint):
    async def use(llm):
        async for _ in llm.generate([5, 6, 7], LONG):
            break
        before = (await llm.stats())["steps"]
        after = await settled(llm)
        assert after["steps"] - before <= 3 and after["steps"] < 20

    serve(checkpoint("llama"), use)


def test_abort_ends_all_samples_and_ignores_unknown_requests(checkpoint):
    async def use(llm):
        ends = []
        async for delta in llm.generate(
            [5, 6, 7], SamplingParams(n=3, max_tokens=100, ignore_eos=True), request_id="x"
        ):
            await llm.abort("x")
            await llm.abort("y")
            if delta.finished:
                ends.append((delta.index, delta.finish_reason))
        assert sorted(ends) == [(0, "abort"), (1, "abort"), (2, "abort")]

    serve(checkpoint("llama"), use)


def test_requests_wait_for_their_turn(checkpoint):
    async def use(llm):
        most = 0

        async def watched(i):
            nonlocal most
            async for _ in llm.generate([5 + i], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)):
                most = max(most, len(llm._live))

        await asyncio.gather(*(watched(i) for i in range(20)))
        assert most == 3

    serve(checkpoint("llama"), use, max_concurrent_requests=3)


def test_a_full_queue_refuses_and_serves_the_others(checkpoint):
    async def use(llm):
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        results = await asyncio.gather(*(llm.complete([5 + i], params) for i in range(60)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, QueueFullError)]
        served = [result for result in results if not isinstance(result, BaseException)]
        assert refused and len(refused) + len(served) == 60 and "max_waiting_requests=4" in str(refused[0])
        assert all(len(output.outputs[0].token_ids) == 20 for output in served)
        assert len((await llm.complete([5], params)).outputs[0].token_ids) == 20

    serve(checkpoint("llama"), use, max_waiting_requests=4)


def test_bad_requests_are_refused_beside_a_stream(checkpoint, truth):
    work, alone = truth("llama")

    async def use(llm):
        reader = asyncio.create_task(read(llm.generate(*work[0], request_id="mine")))
        await asyncio.sleep(0)
        for options in ({"request_id": ""}, {"request_id": 5}, {"priority": "high"}, {"cache_salt": None}):
            with pytest.raises(InvalidRequestError, match=next(iter(options))):
                await llm.complete([5, 6], **options)
        while "mine" not in llm._requests:
            await asyncio.sleep(0)
        with pytest.raises(InvalidRequestError, match="unique among live requests"):
            await llm.complete([5, 6], request_id="mine")
        with pytest.raises(InvalidRequestError, match="at least one token"):
            await llm.complete([])
        assert (await reader)[0] == alone[0].outputs[0].token_ids
        again = await llm.complete(*work[0], request_id="mine")  # the name is free again
        assert again.outputs[0].token_ids == alone[0].outputs[0].token_ids

    serve(checkpoint("llama"), use)


def test_a_reused_name_meets_nothing_of_the_request_before(checkpoint, truth):
    (prompt, params), alone = truth("llama")[0][0], truth("llama")[1]

    async def use(llm):
        for _ in range(8):
            stream = llm.generate([5, 6], SamplingParams(n=2, max_tokens=50, ignore_eos=True), request_id="x")
            async for _ in stream:
                break
            await stream.aclose()  # its abort and late tokens are still on their way
            output = await llm.complete(prompt, params, request_id="x")
            assert output.outputs[0].token_ids == alone[0].outputs[0].token_ids

    serve(checkpoint("llama"), use)


def test_abort_reaches_a_request_that_waits_for_its_turn(checkpoint):
    async def use(llm):
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        first = asyncio.create_task(llm.complete([5, 6], params))
        await asyncio.sleep(0)
        second = asyncio.create_task(llm.complete([7, 8], params, request_id="b"))
        await asyncio.sleep(0.01)
        await llm.abort("b")
        output = await second
        assert output.outputs[0].finish_reason == "abort" and output.outputs[0].token_ids == [] and output.finished
        assert len((await first).outputs[0].token_ids) == 60
        assert len((await llm.complete([7], params)).outputs[0].token_ids) == 60  # the slot is free again

    serve(checkpoint("llama"), use, max_concurrent_requests=1)


def test_giving_up_on_figures_harms_nobody(checkpoint, truth):
    work, alone = truth("llama")

    async def use(llm):
        reader = asyncio.create_task(read(llm.generate(*work[1])))
        for _ in range(10):
            task = asyncio.create_task(llm.stats())
            await asyncio.sleep(0)
            task.cancel()
        assert (await reader)[0] == alone[1].outputs[0].token_ids

    serve(checkpoint("llama"), use)


def test_a_fault_in_one_requests_text_is_its_own(checkpoint, truth, monkeypatch):
    work, alone = truth("llama")

    async def use(llm):
        broken = llm.generate([5, 6], LONG, request_id="broken")
        await anext(broken)
        monkeypatch.setattr(llm._requests["broken"].collector, "_texts", None)
        other = asyncio.create_task(read(llm.generate(*work[2])))
        with pytest.raises(JaxllmError, match="TypeError"):
            await read(broken)
        assert (await other)[0] == alone[2].outputs[0].token_ids
        await settled(llm)

    serve(checkpoint("llama"), use)


def test_a_killed_engine_is_an_error_for_everyone(checkpoint):
    async def use(llm):
        streams = [asyncio.create_task(read(llm.generate([5 + i], LONG))) for i in range(40)]
        while (await llm.stats())["running"] < 30:
            await asyncio.sleep(0.01)
        os.kill(llm._client.pid, signal.SIGKILL)
        begin = time.monotonic()
        figures = asyncio.create_task(llm.stats())
        *results, last = await asyncio.gather(*streams, figures, return_exceptions=True)
        dead = [result for result in results if isinstance(result, EngineDeadError)]
        whole = [result for result in results if not isinstance(result, BaseException)]  # what had been said counts
        assert len(dead) >= 8 and len(dead) + len(whole) == 40 and isinstance(last, EngineDeadError), (results, last)
        assert all(len(tokens) == 100 for tokens, _, _ in whole)
        for use_again in (llm.complete([5]), llm.stats(), llm.warm_up()):
            with pytest.raises(EngineDeadError, match="ended"):
                await use_again
        assert time.monotonic() - begin < 5

    serve(checkpoint("llama"), use, engine_process=True, max_engine_restarts=0)


def _of_all_kinds() -> list[tuple[list[int], SamplingParams]]:
    """Long requests: greedy and seeded, with every parameter that depends on the output so far."""
    prompts = tiny.prompts(20, longest=20)
    work = [(prompt, tiny.mixed_params(i, max_tokens=90)) for i, prompt in enumerate(prompts)]
    regex = StructuredOutputsParams(regex="(the|an)([0-9]{2}(er)*x){9}")
    extras: list[dict] = [
        {"n": 3, "temperature": 1.0, "seed": 5, "logprobs": 2, "frequency_penalty": 0.3},
        {"n": 2, "temperature": 0, "prompt_logprobs": 1},
        {"structured_outputs": regex, "temperature": 1.0, "seed": 6},
        {"structured_outputs": regex, "temperature": 0, "logprobs": 1, "n": 2},
        {"stop": ["qx", "zz"], "temperature": 1.3, "seed": 7},
        {"min_tokens": 60, "stop_token_ids": list(range(3, 200)), "temperature": 0},
    ]
    return work + [(prompts[i], SamplingParams(max_tokens=90, **extra)) for i, extra in enumerate(extras)]


def _same(found, expected) -> None:
    """Asserts that two outputs are one; log-probabilities as nearly as another order of sums allows."""
    for a, b in zip(found.outputs, expected.outputs, strict=True):
        assert (a.token_ids, a.text, a.finish_reason, a.stop_reason) == (
            b.token_ids,
            b.text,
            b.finish_reason,
            b.stop_reason,
        )
        for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
            assert x.keys() == y.keys()
            assert [x[t].logprob for t in x] == pytest.approx([y[t].logprob for t in x], abs=1e-4)
        assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)
    assert bool(found.prompt_logprobs) == bool(expected.prompt_logprobs)


def test_streams_go_on_after_the_engine_was_killed(checkpoint, engine):
    work = _of_all_kinds()
    engine("llama").reset_prefix_cache()
    alone = engine("llama").generate([prompt for prompt, _ in work], [params for _, params in work])

    async def use(llm):
        tasks = [asyncio.create_task(llm.complete(*request, request_id=f"r{i}")) for i, request in enumerate(work)]

        def samples():
            return [sample for i in range(len(work)) if (o := llm.live_output(f"r{i}")) for sample in o.outputs]

        while not any(len(sample.token_ids) > 20 for sample in samples()):
            await asyncio.sleep(0.001)
        first = llm._client.pid
        os.kill(first, signal.SIGKILL)
        middle = [sample for sample in samples() if sample.token_ids and not sample.finished]
        while not llm.restarting:
            await asyncio.sleep(0.001)
        late = asyncio.create_task(llm.complete(*work[0]))  # waits for the next one
        leaves = asyncio.create_task(llm.complete(*work[1], request_id="leaves"))
        figures = asyncio.create_task(llm.stats())
        await asyncio.sleep(0)
        await llm.abort("leaves")
        begin = time.monotonic()
        assert (await leaves).outputs[0].finish_reason == "abort" and time.monotonic() - begin < 2
        outputs = await asyncio.gather(*tasks)
        assert len(middle) > 15 and llm.num_restarts == 1 and llm._client.pid != first and not llm.restarting
        for found, expected in zip([*outputs, await late], [*alone, alone[0]], strict=True):
            _same(found, expected)
        assert (await figures)["steps"] >= 0
        stats = await settled(llm)
        assert stats["cache_usage"] == 0 and not llm._live and not llm._requests and not len(llm._client._ledger)

    # Bounds of the queue hold for those that are new, not for those that were in already.
    serve(checkpoint("llama"), use, engine_process=True, max_waiting_requests=40)


def test_an_engine_that_hangs_is_replaced(checkpoint, truth):
    work, alone = truth("llama")

    async def use(llm):
        tasks = [asyncio.create_task(llm.complete(*request)) for request in work]
        await asyncio.sleep(0.005)
        os.kill(llm._client.pid, signal.SIGSTOP)
        outputs = await asyncio.gather(*tasks)
        assert llm.num_restarts == 1
        for found, expected in zip(outputs, alone, strict=True):
            _same(found, expected)

    serve(checkpoint("llama"), use, engine_process=True, engine_timeout=2.0)


def test_closing_ends_the_waiting(checkpoint):
    async def use(llm):
        streams = [asyncio.create_task(read(llm.generate([5 + i], LONG))) for i in range(5)]
        await asyncio.sleep(0.05)
        llm.close()
        results = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        with pytest.raises(EngineDeadError, match="closed"):
            await llm.complete([5])

        return llm

    pump = serve(checkpoint("llama"), use)._pump
    pump.join(timeout=5)
    assert not pump.is_alive()

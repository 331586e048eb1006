"""Streams that end early: clients that leave, deadlines, engines that die; and what is let in at all."""

import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import socket
import threading
import time

import httpx2
import pytest
import uvloop

from jaxllm import AsyncLLM
from jaxllm.serving import gate
from jaxllm.serving.app import make_services
from jaxllm.serving.config import ServerConfig
from jaxllm.serving.errors import ApiError
from jaxllm.serving.server import bind, run
from tests.serving.harness import running, scripted

LONG = dict(prompt="the hand", max_tokens=400, ignore_eos=True)


def until(condition, seconds: float = 20) -> None:
    """Waits for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def slow(model):
    """A server whose engine takes 100 steps a second and lets two samples wait beyond two running ones."""
    engine = scripted(model, ["the " * 200] * 100, steps_per_second=100, max_num_seqs=2)
    with running(engine, max_queued_requests=2, max_queued_tokens=40, drain_timeout=30) as found:
        yield found


def send(server, body: dict) -> socket.socket:
    """A request on a connection of its own."""
    text = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(text)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + text)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [LONG, {**LONG, "n": 2}, {**LONG, "prompt": ["the", "hand"]}])
def test_a_client_that_leaves_is_aborted(server, body, stream):
    before = server.stats()["scheduled_tokens"]
    with send(server, {**body, "stream": stream}) as connection:
        if stream:
            assert b"data: " in connection.recv(65536) + connection.recv(65536)
        else:
            until(lambda: server.stats()["running"])
    until(lambda: not server.stats()["running"])
    until(lambda: server.services.admission.samples == 0)
    assert server.stats()["scheduled_tokens"] - before < 400  # it did not run to its end
    until(lambda: b'finished_reason="abort"' in server.http.get("/metrics").content)


def test_a_crowd_leaves_nothing_behind(server):
    rng = random.Random(0)
    bodies = [
        {**LONG, "max_tokens": 30, "n": rng.choice([1, 1, 3]), "stream": rng.random() < 0.7, "seed": index}
        for index in range(60)
    ]
    manners = [rng.choice(["read", "read", "leave", "deadline", "cancel"]) for _ in bodies]

    async def one(client, body, manner) -> None:
        await asyncio.sleep(rng.random() * 0.3)
        headers = {"X-Request-Timeout": "0.05"} if manner == "deadline" else {}
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            assert answer.status_code in (200, 504)
            pieces = answer.aiter_lines()
            if manner == "leave":
                await anext(pieces)
                return
            lines = [line async for line in pieces if line]
        if manner == "read" and body["stream"]:
            ends = [line for line in lines if '"finish_reason":"length"' in line]
            assert lines[-1] == "data: [DONE]" and len(ends) == body["n"]
        elif manner == "read":
            assert json.loads(lines[0])["usage"]["completion_tokens"] == 30 * body["n"]

    async def crowd() -> None:
        limits = httpx2.Limits(max_connections=100)
        async with httpx2.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            tasks = [asyncio.create_task(one(client, *work)) for work in zip(bodies, manners, strict=True)]
            await asyncio.sleep(0.4)
            for task, manner in zip(tasks, manners, strict=True):
                if manner == "cancel":
                    task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), results

    before = server.call(lambda: len(asyncio.all_tasks()))
    asyncio.run(crowd())
    admission, llm = server.services.admission, server.services.llm
    until(lambda: not server.stats()["running"] and not admission.samples)
    assert admission.waiting_tokens == 0 and not llm._live and not llm._requests
    until(lambda: server.call(lambda: len(asyncio.all_tasks())) <= before)
    assert server.stats()["cache_usage"] == 0


def test_tokens_come_one_by_one(slow):
    times, sizes = [], []
    with slow.http.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 20, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                sizes.append(len(json.loads(line[6:])["choices"][0]["text"]))
                times.append(time.monotonic())
    assert len(times) >= 15 and times[-1] - times[0] > 0.1


def test_too_many_get_429_with_retry_after(slow):
    held = [send(slow, {**LONG, "stream": True}) for _ in range(4)]
    until(lambda: slow.services.admission.samples == 4)
    refused = slow.post("/v1/completions", **LONG)
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
    error = refused.json()["error"]
    assert error["type"] == "rate_limit_error" and "max_queued_requests=2" in error["message"]
    for connection in held:
        connection.close()
    until(lambda: slow.services.admission.samples == 0)
    assert slow.post("/v1/completions", **{**LONG, "max_tokens": 3}).status_code == 200
    # larger than the bound by itself: not refused for ever
    assert slow.post("/v1/completions", **{**LONG, "max_tokens": 3, "n": 8}).status_code == 200


def test_a_refusal_leaves_nothing_for_the_garbage_collector(slow):
    """Cycles of thousands of refusals take a tenth of a second to collect, in which no stream goes on."""
    held = [send(slow, {**LONG, "stream": True}) for _ in range(4)]
    until(lambda: slow.stats()["running"] == 4)
    gc.collect()
    gc.disable()
    try:
        assert [slow.post("/v1/completions", **LONG).status_code for _ in range(5)] == [429] * 5
        until(lambda: not any(isinstance(thing, ApiError) for thing in gc.get_objects()), 2)
    finally:
        gc.enable()
        for connection in held:
            connection.close()


def test_connections_are_taken_in_while_the_loop_is_busy(model):
    """Not one a turn of the loop, as libuv would."""
    turns, burst = 0, 40

    async def main() -> None:
        nonlocal turns
        async with AsyncLLM(engine=scripted(model, [])) as llm:
            config = ServerConfig(port=0, log_level="warning")
            with contextlib.closing(bind(config)) as bound:
                work = asyncio.ensure_future(run(make_services(llm, config), bound, "here"))
                await asyncio.sleep(0.1)
                clients = [socket.create_connection(bound.getsockname()) for _ in range(burst)]
                for client in clients:
                    client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                    client.setblocking(False)
                waiting = set(clients)
                while waiting:
                    time.sleep(0.002)
                    await asyncio.sleep(0)
                    turns += 1
                    for client in list(waiting):
                        with contextlib.suppress(BlockingIOError):
                            assert client.recv(100).startswith(b"HTTP/1.1 200")
                            waiting.remove(client)
                            client.close()
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main(), 20))
    assert turns < burst


def test_waiting_prompt_tokens_are_bounded(slow):
    ticket = slow.call(slow.services.admission.enter, 1, 35)
    refused = slow.post("/v1/completions", prompt=[5] * 10)
    assert refused.status_code == 429 and "max_queued_tokens=40" in refused.json()["error"]["message"]
    slow.call(ticket.started)
    assert slow.post("/v1/completions", prompt=[5] * 10, max_tokens=1).status_code == 200
    slow.call(ticket.leave)
    slow.call(ticket.leave)
    assert slow.services.admission.samples == slow.services.admission.waiting_tokens == 0


def test_deadlines(slow):
    begin = time.monotonic()
    late = slow.http.post("/v1/completions", json=LONG, headers={"X-Request-Timeout": "0.2"})
    assert late.status_code == 504 and late.json()["error"]["type"] == "timeout_error"
    with slow.http.stream(
        "POST", "/v1/completions", json={**LONG, "stream": True}, headers={"X-Request-Timeout": "0.2"}
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert json.loads(lines[-2][6:])["error"]["code"] == "timeout" and lines[-1] == "data: [DONE]" and len(lines) > 5
    assert time.monotonic() - begin < 5
    until(lambda: not slow.stats()["running"])
    for value in ("0", "-1", "soon", "nan"):
        refused = slow.http.post("/v1/completions", json=LONG, headers={"X-Request-Timeout": value})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "X-Request-Timeout"


def test_the_time_that_a_body_takes_counts(slow, monkeypatch):
    def slowly():
        yield b'{"prompt": [5], '
        time.sleep(0.5)
        yield b'"max_tokens": 100, "ignore_eos": true}'  # a second

    headers = {"content-type": "application/json"}
    late = slow.http.post("/v1/completions", content=slowly(), headers=headers | {"X-Request-Timeout": "1.25"})
    assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.1)
    late = slow.http.post("/v1/completions", content=slowly(), headers=headers)
    assert late.status_code == 408 and late.json()["error"]["code"] == "body_too_slow"


def test_draining_lets_the_running_end(model):
    engine = scripted(model, ["the " * 100] * 3, steps_per_second=100)
    with running(engine, drain_timeout=30) as server:
        answers = []

        def read():
            answers.append(httpx2.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 60}, timeout=30))

        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: server.stats()["running"])
        assert server.http.get("/ready").status_code == 200
        server.drain()
        refused = server.post("/v1/completions", **LONG)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
        assert server.http.get("/ready").status_code == 503 and server.http.get("/health").status_code == 200
        assert int(server.http.get("/ready").headers["retry-after"]) > 0
        reader.join(30)
        assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 60
        until(lambda: server.ended)
        assert server.status == 0


def test_draining_does_not_wait_for_ever(model):
    engine = scripted(model, ["the " * 100] * 3, steps_per_second=5)
    with running(engine, drain_timeout=0.2) as server, send(server, {**LONG, "stream": True}):
        until(lambda: server.stats()["running"])
        server.drain()
        until(lambda: server.ended)


def test_a_dead_engine_ends_the_server(model):
    with running(scripted(model, ["the " * 100] * 3, steps_per_second=100)) as server:
        with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.services.llm._client.close()
            rest = [line for line in lines if line]
        assert json.loads(rest[-2][6:])["error"]["code"] == "engine_dead"
        until(lambda: server.ended)
        assert server.status == 1


def test_a_stream_goes_on_in_another_engine(model):
    body = dict(prompt="the hand", max_tokens=500, ignore_eos=True, temperature=1.0, seed=3, return_token_ids=True)
    with running(model, engine={"engine_process": True}) as server:
        alone = server.post("/v1/completions", **body).json()["choices"][0]
        with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line)
            choices = [json.loads(next(lines)[6:])["choices"][0]]
            os.kill(server.services.llm._client.pid, signal.SIGKILL)
            until(lambda: server.services.llm.restarting)
            for path in ("/health", "/ready"):
                down = server.http.get(path)
                assert down.status_code == 503 and int(down.headers["retry-after"]) > 0
                assert down.json()["error"]["code"] == "engine_restarting"
            choices += [json.loads(line[6:])["choices"][0] for line in lines if line != "data: [DONE]"]
        assert [t for choice in choices for t in choice["token_ids"]] == alone["token_ids"]
        assert "".join(choice["text"] for choice in choices) == alone["text"]
        assert choices[-1]["finish_reason"] == "length"
        until(lambda: server.http.get("/health").status_code == 200)
        text = server.http.get("/metrics").text
        assert [line[-4:] for line in text.splitlines() if line.startswith("jaxllm:engine_restarts_total")] == [" 1.0"]


def test_health_follows_the_engine(model):
    engine = scripted(model, [])
    with running(engine, health_timeout=0.5) as server:
        assert server.http.get("/health").status_code == 200
        with engine.client._lock:  # an engine that hangs: it neither answers nor ends
            until(lambda: server.http.get("/health").status_code == 503)
            assert server.http.get("/health").json()["error"]["code"] == "engine_stuck"
            assert server.http.get("/ready").status_code == 503
            assert int(server.http.get("/ready").headers["retry-after"]) > 0
        until(lambda: server.http.get("/health").status_code == 200)

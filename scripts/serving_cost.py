#!/usr/bin/env python
"""What the server itself costs: tokens/s over server-sent events from an engine that emits at once.

    python scripts/serving_cost.py --streams 256 --tokens 400

The server runs in a process of its own with `jaxllm.bench.stub_engine`, everything else as in `jaxllm serve`: AsyncLLM,
detokenizer, metrics, HTTP. The client, here, only counts. Figures: tokens and events a second over the time from the
first to the last byte of all streams, and the server's processor time for a token.

    python scripts/serving_cost.py --streams 1

sends one request after the other over one connection, as clients that pool theirs do, to an engine that takes 100 steps
a second unless --rate says otherwise, the first one at once. Figures: from the moment the request is sent to its first
token's arrival here, the same without the time in which the engine had it, and from the moment the engine brings any
other token to its arrival. Five steps' time lies between two requests, in which a processor's caches forget the server
where others use them, too; with --rate 20000 the engine is as good as instant, and requests follow at once.
"""

import asyncio
import bisect
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import time
from multiprocessing.connection import Connection
from typing import Annotated, Any

import typer

TEXT = "The quick brown fox jumps over the lazy dog, and the five boxing wizards jump quickly. "


def server(port: Connection, tokens: int, streams: int, rate: float | None, profile: str | None) -> None:
    """The server's process: sends its port, then serves until it is told to end, and sends its processor time."""
    import uvloop

    from jaxllm import AsyncLLM
    from jaxllm.bench.stub_engine import stub_engine
    from jaxllm.checkpoint import open_checkpoint
    from jaxllm.engine import heap
    from jaxllm.serving.app import make_services
    from jaxllm.serving.config import ServerConfig
    from jaxllm.serving.log import set_up_logging
    from jaxllm.serving.server import MANY, bind, run

    tokenizer = open_checkpoint("smollm2", None).tokenizer()
    set_up_logging("warning", "json")

    async def main() -> None:
        config = ServerConfig(port=0, served_model_name=["stub"], max_queued_requests=1 << 16)
        reply = (tokenizer.encode(TEXT) * (tokens // 10 + 1))[:tokens]
        engine = stub_engine(
            tokenizer, lambda _: reply, max_num_seqs=streams, steps_per_second=rate, max_model_len=1 << 20
        )
        async with AsyncLLM(engine=engine, max_concurrent_requests=MANY) as llm:
            if streams > 1:
                engine.client.loop = asyncio.get_running_loop()  # type: ignore[attr-defined]
            services = make_services(llm, config)
            heap.freeze(heap.SERVERS_THRESHOLD)
            with contextlib.closing(bind(config)) as bound:
                work = asyncio.ensure_future(run(services, bound, "stub"))
                port.send(bound.getsockname()[1])
                loop = asyncio.get_running_loop()
                while (asked := await loop.run_in_executor(None, port.recv)) != "end":
                    client: Any = engine.client
                    port.send(time.process_time() if asked == "time" else (client.asked, client.emitted))
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if profile:
            import cProfile

            with cProfile.Profile() as measured:
                runner.run(main())
            measured.dump_stats(profile)
        else:
            runner.run(main())
    os._exit(0)


class Reader(asyncio.Protocol):
    """One stream at a time: counts events as they come."""

    def __init__(self, request: bytes):
        self._request = request
        self._begin()

    def _begin(self) -> None:
        self.events = 0
        self.arrivals: list[float] = []  # of data with events in it
        self.sent = 0.0
        self.begin = self.end = 0.0
        self.tail = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport) -> None:
        self._transport = transport
        self.send()

    def send(self) -> None:
        """Asks for the stream."""
        self.sent = time.perf_counter()
        self._transport.write(self._request)

    def again(self) -> None:
        """Asks for the next stream, when one has come to its end."""
        self._begin()
        self.send()

    def close(self) -> None:
        """Closes the connection."""
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.begin = self.begin or now
        self.end = now
        events = data.count(b"data: ")
        self.events += events
        if events:
            self.arrivals.append(now)
        self.tail = (self.tail + data)[-600:]
        if self.tail.endswith(b"[DONE]\n\n\r\n0\r\n\r\n") and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"the server closed the stream: {self.tail!r}"))


def request(tokens: int, api: str) -> bytes:
    """Asks for a stream."""
    body = {"model": "stub", "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"prompt": "The"} if api == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    path = "/v1/completions" if api == "completions" else "/v1/chat/completions"
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    return head.encode() + text


async def load(port: int, streams: int, tokens: int, api: str) -> list[Reader]:
    """All streams at once, to their end."""
    loop, asked = asyncio.get_running_loop(), request(tokens, api)
    made = [await loop.create_connection(lambda: Reader(asked), "127.0.0.1", port) for _ in range(streams)]
    readers = [reader for _, reader in made]
    await asyncio.gather(*(reader.done for reader in readers))
    for reader in readers:
        reader.close()
    return readers


def median(values: list[float]) -> float:
    """In milliseconds."""
    return statistics.median(values) * 1e3


async def latencies(port: int, requests: int, tokens: int, rate: float, api: str) -> list[tuple[float, list[float]]]:
    """When each request was sent and its events arrived, one after the other over one connection, each when the engine
    owes no step to the one before."""
    loop, asked = asyncio.get_running_loop(), request(tokens, api)
    _, reader = await loop.create_connection(lambda: Reader(asked), "127.0.0.1", port)
    await reader.done  # the connection is there
    found = []
    for _ in range(requests):
        await asyncio.sleep(5 / rate)
        reader.again()
        await reader.done
        found.append((reader.sent, reader.arrivals))
    reader.close()
    return found


def one_stream(ours: Connection, port: int, requests: int, tokens: int, rate: float, runs: int, api: str) -> None:
    """Prints what the server adds to a lone stream's times."""
    import uvloop

    for _ in range(runs):
        ours.send("time")
        before = ours.recv()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            streams = runner.run(latencies(port, requests, tokens, rate, api))
        ours.send("time")
        used = ours.recv() - before
        ours.send("steps")
        asked, emitted = ours.recv()
        asked = asked[-len(streams) :]
        first = [arrivals[0] - sent for sent, arrivals in streams]
        engine = [emitted[bisect.bisect(emitted, at)] - at for at in asked]
        server = [whole - part for whole, part in zip(first, engine, strict=True)]
        others = [arrival for _, arrivals in streams for arrival in arrivals[1:]]
        added = [arrival - emitted[bisect.bisect(emitted, arrival) - 1] for arrival in others]
        print(
            f"{api}, one stream: first token p50 {median(first):.2f} ms after the request, "
            f"{median(server):.2f} ms without the engine's part; "
            f"each other p50 {median(added):.3f} ms p99 {sorted(added)[int(0.99 * len(added))] * 1e3:.2f} ms "
            f"after the engine; {used / len(streams) * 1e3:.2f} ms of the server's processor a request "
            f"({len(first)} requests, {len(added)} tokens)"
        )


def main(
    streams: Annotated[int, typer.Option(help="concurrent streams")] = 256,
    tokens: Annotated[int, typer.Option(help="tokens of each")] = 400,
    runs: Annotated[int, typer.Option(help="runs; each is printed")] = 3,
    rate: Annotated[float | None, typer.Option(help="steps/s of the engine; default: as fast as the server")] = None,
    requests: Annotated[int, typer.Option(help="of a lone stream's runs")] = 40,
    api: Annotated[str, typer.Option(help="completions or chat")] = "chat",
    profile: Annotated[str | None, typer.Option(help="write the server's cProfile here")] = None,
) -> None:
    """Measures and prints."""
    import uvloop

    if streams == 1:
        rate, tokens = rate or 100.0, min(tokens, 20)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=server, args=(theirs, tokens, streams, rate, profile), daemon=True)
    process.start()
    port = ours.recv()
    time.sleep(1)
    if streams == 1:
        one_stream(ours, port, requests, tokens, rate or 100.0, runs, api)
    for _ in range(runs if streams > 1 else 0):
        ours.send("time")
        before = ours.recv()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            readers = runner.run(load(port, streams, tokens, api))
        ours.send("time")
        used = ours.recv() - before
        counted = [int(re.findall(rb'"completion_tokens":(\d+)', reader.tail)[-1]) for reader in readers]
        seconds = max(reader.end for reader in readers) - min(reader.begin for reader in readers)
        total, events = sum(counted), sum(reader.events for reader in readers)
        print(
            f"{api}, {streams} streams: {total / seconds:,.0f} tokens/s in {events / seconds:,.0f} events/s; "
            f"{used / total * 1e6:.1f} µs of the server's processor a token"
        )
    ours.send("end")
    process.join(10)


if __name__ == "__main__":
    typer.run(main)

#!/usr/bin/env python
"""What a server does under more than it can take: are those who are let in served as fast, the others refused at once?

    jaxllm serve MODEL --max-num-seqs 32 --max-queued-requests 32
    python scripts/overload.py http://127.0.0.1:8000 --streams 32

Capacity is what so many streams, each followed by the next, get done. Then requests come at random moments (Poisson),
at 90 % of it and at a multiple. The bar: at the multiple, the median time for an output token of those who are let in
is at most 1.3 times that at 90 %, and 99 % of the refusals have come within 50 ms of the connection's first byte.
"""

import asyncio
import dataclasses
import json
import os
import random
import time
from typing import Annotated
from urllib.parse import urlsplit

import typer

BAR_TPOT, BAR_REFUSAL = 1.3, 0.05


@dataclasses.dataclass
class Outcome:
    """One request. Seconds: until the first and the last event, or the whole refusal, from when it was sent; and how
    much later that was than it should have been, which is this client's own fault."""

    status: int = 0
    first: float = 0.0
    last: float = 0.0
    late: float = 0.0

    def tpot(self, tokens: int) -> float:
        """Seconds for an output token after the first."""
        return (self.last - self.first) / (tokens - 1)


class Client(asyncio.Protocol):
    """One streamed request over a connection of its own."""

    def __init__(self, request: bytes):
        self._request, self.outcome, self._begin = request, Outcome(), time.perf_counter()
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter() - self._begin
        if not self.outcome.status:
            self.outcome.status = int(data[9:12])
        if b"data: {" in data:
            self.outcome.first = self.outcome.first or now
            self.outcome.last = now
        elif not self.outcome.first:
            self.outcome.last = now

    def connection_lost(self, error) -> None:
        if not self.done.done():
            self.done.set_result(self.outcome)


class Load:
    """Requests of one shape to one server."""

    def __init__(self, url: str, prompt: int, tokens: int, vocabulary: int, key: str | None):
        address = urlsplit(url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._prompt, self._vocabulary, self.tokens = prompt, vocabulary, tokens
        self._key = f"authorization: Bearer {key}\r\n" if key else ""

    async def one(self, due: float | None = None) -> Outcome:
        """A prompt of random tokens, so that no cached prefix helps; `due`: when it should be sent."""
        ids = [random.randrange(10, self._vocabulary) for _ in range(self._prompt)]
        body = json.dumps({"prompt": ids, "max_tokens": self.tokens, "ignore_eos": True, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{self._key}content-type: application/json\r\n"
        request = f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: Client(request), self._host, self._port)
        client.outcome.late = max(0.0, time.perf_counter() - due) if due else 0.0
        return await client.done

    async def capacity(self, streams: int, seconds: float) -> float:
        """Requests a second of so many streams in a closed loop; those under way at the end count by their share."""
        begin, ends = time.perf_counter(), []

        async def again() -> None:
            while time.perf_counter() - begin < seconds:
                outcome = await self.one()
                if outcome.status != 200:
                    raise SystemExit(f"status {outcome.status} at {streams} streams: nothing may be refused here")
                ends.append(time.perf_counter())

        await asyncio.gather(*(again() for _ in range(streams)))
        return len(ends) / (max(ends) - begin)

    async def open_loop(self, rate: float, seconds: float) -> list[Outcome]:
        """Requests at random moments at this rate."""
        tasks, at, begin = [], 0.0, time.perf_counter()
        while at < seconds:
            await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
            tasks.append(asyncio.ensure_future(self.one(begin + at)))
            at += random.expovariate(rate)
        return list(await asyncio.gather(*tasks))


def quantile(values: list[float], q: float) -> float:
    """Of a sorted copy; 0 of nothing."""
    return sorted(values)[min(int(q * len(values)), len(values) - 1)] if values else 0.0


def describe(name: str, outcomes: list[Outcome], tokens: int) -> tuple[float, float]:
    """Prints a line; the median time for a token and the 99th percentile of refusals' seconds."""
    good = [outcome for outcome in outcomes if outcome.status == 200]
    refused = [outcome.last for outcome in outcomes if outcome.status == 429]
    tpots, ttfts = [outcome.tpot(tokens) for outcome in good], [outcome.first for outcome in good]
    soon = sum(seconds <= BAR_REFUSAL for seconds in refused)
    late = [outcome.late for outcome in outcomes]
    others = len(outcomes) - len(good) - len(refused)
    print(
        f"{name}: {len(outcomes)} requests, {len(good)} served, {len(refused)} refused, {others} others; "
        f"TPOT p50 {quantile(tpots, 0.5) * 1e3:.2f} ms p99 {quantile(tpots, 0.99) * 1e3:.2f} ms; "
        f"TTFT p50 {quantile(ttfts, 0.5) * 1e3:.0f} ms; "
        f"refused within p50 {quantile(refused, 0.5) * 1e3:.1f} ms p99 {quantile(refused, 0.99) * 1e3:.1f} ms "
        f"most {max(refused, default=0) * 1e3:.1f} ms, {100 * soon / max(1, len(refused)):.1f} % within 50 ms; "
        f"the client was late by p50 {quantile(late, 0.5) * 1e3:.1f} ms p99 {quantile(late, 0.99) * 1e3:.1f} ms"
    )
    return quantile(tpots, 0.5), quantile(refused, 0.99)


def main(
    url: str,
    *,
    streams: Annotated[int, typer.Option(help="the server's --max-num-seqs")],
    prompt: Annotated[int, typer.Option(help="prompt tokens")] = 32,
    tokens: Annotated[int, typer.Option(help="output tokens")] = 64,
    vocabulary: Annotated[int, typer.Option(help="token ids are drawn below this")] = 300,
    seconds: Annotated[float, typer.Option(help="length of each of the three parts")] = 20.0,
    times: Annotated[float, typer.Option(help="overload, in capacities")] = 4.0,
    api_key: Annotated[str | None, typer.Option(envvar="JAXLLM_API_KEY")] = None,
) -> None:
    """Measures and prints; status 1 below the bar."""
    load = Load(url, prompt, tokens, vocabulary, api_key)

    async def measure() -> bool:
        await load.capacity(streams, min(seconds, 5.0))  # whatever has to be compiled or warmed
        capacity = await load.capacity(streams, seconds)
        print(
            f"capacity: {capacity:.1f} requests/s, {capacity * tokens:.0f} tokens/s; {os.cpu_count()} cores, ", end=""
        )
        print(f"load {os.getloadavg()[0]:.1f}")
        usual, _ = describe("at 90 %", await load.open_loop(0.9 * capacity, seconds), tokens)
        over, refusal = describe(f"at {times:g} times", await load.open_loop(times * capacity, seconds), tokens)
        print(
            f"TPOT {over / usual:.2f} times that at 90 % (bar {BAR_TPOT}); 99 % refused within {refusal * 1e3:.1f} ms"
        )
        return over <= BAR_TPOT * usual and refusal <= BAR_REFUSAL

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        raise SystemExit(not runner.run(measure()))


if __name__ == "__main__":
    typer.run(main)

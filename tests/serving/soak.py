"""A server under clients of all manners for a long time: `python -m tests.serving.soak --requests 5000`.

Rates change at random; clients read whole answers or streams, leave in the middle, read slowly, send what is malformed,
too large or never ends. Every well-formed request must bring the tokens that it brings alone, nothing may stay behind,
and nothing may be logged as a warning or an error. The engine is a tiny model in this process, so that its scheduler
can be looked into; memory is this process's, clients included.
"""

import asyncio
import collections
import contextlib
import dataclasses
import gc
import json
import logging
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import httpx2
import typer

from tests.engine import tiny
from tests.serving.harness import Running, running, write_chat_model

MAX_BODY = 1 << 20
SAMPLES = 20  # of the memory in use


@dataclasses.dataclass
class Report:
    """What came of it.

    Attributes:
      counts: requests by manner of client.
      wrong: what should not have been, in words.
      logged: messages of warnings and errors.
      memory: MB in use by this process, at SAMPLES moments when nothing was under way or waited for.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    logged: list[str] = dataclasses.field(default_factory=list)
    memory: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class _Logged(logging.Handler):
    def __init__(self, into: list[str]):
        super().__init__(logging.WARNING)
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        self._into.append(f"{record.name}: {self.format(record)}")


def bodies(count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Requests of which each brings the same tokens every time: greedy ones and seeded ones."""
    made: list[dict[str, Any]] = []
    for index in range(count):
        prompt = [draw.randrange(tiny.FIRST_BYTE, tiny.VOCAB) for _ in range(draw.choice((1, 5, 20, 60, 200)))]
        if index % 4 == 1:
            prompt = made[-1]["prompt"] + prompt[:20]  # shares a prefix
        body = {"prompt": prompt, "max_tokens": draw.choice((1, 4, 16, 40, 100)), "return_token_ids": True}
        if index % 3:
            body |= {"temperature": 0.9, "top_p": 0.95, "seed": index, "repetition_penalty": draw.choice((1.0, 1.2))}
        else:
            body |= {"temperature": 0.0, "ignore_eos": bool(index % 2)}
        made.append(body)
    return made


class Soak:
    """Clients of one server. `expected[i]` are the tokens that `asked[i]` brings alone."""

    def __init__(self, server: Running, draw: random.Random):
        self._server, self._draw, self.report = server, draw, Report()
        self._asked = bodies(24, draw)
        self._expected = [self._alone(body) for body in self._asked]
        manners: list[tuple[Callable[[httpx2.AsyncClient, int], Awaitable[None]], int]] = [
            (self._whole, 40), (self._stream, 25), (self._leaves, 15), (self._slow, 4), (self._malformed, 8),
            (self._too_large, 2), (self._never_ends, 2), (self._embedding, 4),
        ]  # fmt: skip
        self._manners, self._weights = [manner for manner, _ in manners], [weight for _, weight in manners]

    def _alone(self, body: dict[str, Any]) -> list[int]:
        answer = self._server.post("/v1/completions", **body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    def _check(self, manner: str, index: int, tokens: list[int]) -> None:
        if tokens != self._expected[index]:
            self.report.wrong.append(f"{manner}: request {index} brought {tokens}, alone {self._expected[index]}")

    async def _whole(self, client: httpx2.AsyncClient, index: int) -> None:
        answer = await client.post("/v1/completions", json=self._asked[index])
        assert answer.status_code == 200, answer.text
        self._check("whole", index, answer.json()["choices"][0]["token_ids"])

    async def _stream(self, client: httpx2.AsyncClient, index: int) -> None:
        body, tokens = self._asked[index] | {"stream": True}, []
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    tokens += json.loads(line[6:])["choices"][0]["token_ids"]
        self._check("stream", index, tokens)

    async def _leaves(self, client: httpx2.AsyncClient, index: int) -> None:
        """In a stream after some events, or before an answer's end."""
        body, count = self._asked[index] | {"max_tokens": 250, "ignore_eos": True}, self._draw.randrange(30)
        if count < 5:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._draw.random() * 0.3):
                    await client.post("/v1/completions", json=body)
            return
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True, "n": 2}) as answer:
            async for _ in answer.aiter_lines():
                count -= 1
                if not count:
                    break

    async def _connect(self, body: bytes, length: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self._server.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}"
        writer.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + body)
        return reader, writer

    async def _slow(self, client: httpx2.AsyncClient, index: int) -> None:
        """Reads a stream in small pieces with pauses: the server may merge tokens, and loses none."""
        body = json.dumps(self._asked[index] | {"stream": True}).encode()
        reader, writer = await self._connect(body, len(body))
        pieces, last = [], b"x"
        while last:
            last = await reader.read(200)
            pieces.append(last)
            await asyncio.sleep(0.002)
        writer.close()
        events = [line[6:] for line in b"".join(pieces).split(b"\n") if line.startswith(b"data: {")]
        self._check("slow", index, [t for event in events for t in json.loads(event)["choices"][0]["token_ids"]])

    async def _never_ends(self, client: httpx2.AsyncClient, index: int) -> None:
        body = json.dumps(self._asked[index]).encode()
        _, writer = await self._connect(body[: self._draw.randrange(len(body))], len(body))
        await writer.drain()
        await asyncio.sleep(self._draw.random() * 0.1)
        writer.close()

    async def _malformed(self, client: httpx2.AsyncClient, index: int) -> None:
        good = json.dumps(self._asked[index]).encode()
        garbage = self._draw.choice(
            [
                self._draw.randbytes(200),
                good[: self._draw.randrange(len(good))],
                json.dumps(self._asked[index] | {"max_tokens": -1}).encode(),
                json.dumps(self._asked[index] | {"no_such_field": 1}).encode(),
                json.dumps(self._asked[index] | {"prompt": [tiny.VOCAB]}).encode(),
                json.dumps(self._asked[index] | {"prompt": [7] * 600, "stream": True}).encode(),
                b"[" * 100_000,
                b"",
            ]
        )
        answer = await client.post("/v1/completions", content=garbage, headers={"content-type": "application/json"})
        if answer.status_code not in (400, 413):
            self.report.wrong.append(f"malformed: status {answer.status_code} for {garbage[:100]!r}")

    async def _too_large(self, client: httpx2.AsyncClient, index: int) -> None:
        async def pieces():
            for _ in range(2 * MAX_BODY >> 16):
                yield b" " * (1 << 16)

        try:
            answer = await client.post("/v1/completions", content=pieces())
        except httpx2.TransportError:
            return  # the server answered and closed while there was more to send
        if answer.status_code != 413:
            self.report.wrong.append(f"too large: status {answer.status_code}")

    async def _embedding(self, client: httpx2.AsyncClient, index: int) -> None:
        answer = await client.post("/v1/embeddings", json={"input": self._asked[index]["prompt"]})
        if answer.status_code != 200 or len(answer.json()["data"][0]["embedding"]) != tiny.HIDDEN:
            self.report.wrong.append(f"embedding: status {answer.status_code}")

    async def _one(self, client: httpx2.AsyncClient) -> None:
        manner = self._draw.choices(self._manners, self._weights)[0]
        name = manner.__name__.removeprefix("_")
        self.report.counts[name] += 1
        try:
            await manner(client, self._draw.randrange(len(self._asked)))
        except Exception as error:
            self.report.wrong.append(f"{name}: {type(error).__name__}: {error}")

    async def _some(self, requests: int) -> None:
        """So many, at rates that change at random; returns when all have ended."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
        async with httpx2.AsyncClient(base_url=self._server.url, timeout=120, limits=limits) as client:
            tasks: list[asyncio.Task] = []
            while len(tasks) < requests:
                rate = self._draw.choice((10, 40, 1000))
                for _ in range(min(requests - len(tasks), self._draw.randrange(1, 60))):
                    tasks.append(asyncio.ensure_future(self._one(client)))
                    await asyncio.sleep(self._draw.expovariate(rate))
            await asyncio.gather(*tasks)

    def _settled(self) -> None:
        """Waits for those that have left to be gone, and looks whether anything of them is."""
        for _ in range(400):
            stats = self._server.stats()
            samples = self._server.call(lambda: self._server.services.admission.samples)
            if not (stats["running"] or stats["waiting"] or samples):
                break
            time.sleep(0.05)
        for name in ("running", "waiting", "cache_usage"):
            if stats[name]:
                self.report.wrong.append(f"left behind: {name}={stats[name]}")
        admission, llm = self._server.services.admission, self._server.services.llm
        if admission.samples or admission.waiting_tokens or llm._live or llm._requests:
            self.report.wrong.append(f"left behind: {admission.__dict__} {llm._live} {llm._requests}")
        for scheduler in llm._client._core.schedulers:  # type: ignore[attr-defined]
            scheduler.check()

    def run(self, requests: int) -> Report:
        """So many requests, in SAMPLES rounds."""
        handler, begin = _Logged(self.report.logged), time.perf_counter()
        logging.getLogger().addHandler(handler)
        try:
            for number in range(SAMPLES):
                asyncio.run(self._some(requests * (number + 1) // SAMPLES - requests * number // SAMPLES))
                self._settled()
                self.report.memory.append(_memory())
        finally:
            logging.getLogger().removeHandler(handler)
        self.report.seconds = time.perf_counter() - begin
        return self.report


def _memory() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def soak(model: str, requests: int, seed: int) -> Report:
    """Starts a server of a model, see `write_chat_model`, and its clients. Few pages, so that requests lose theirs."""
    options = {"kv_cache_memory_bytes": 100 * 4096}
    with running(model, engine=options, served_model_name=["tiny"], max_body_bytes=MAX_BODY) as server:
        return Soak(server, random.Random(seed)).run(requests)


def main(
    requests: Annotated[int, typer.Option(help="how many")] = 2000, seed: Annotated[int, typer.Option()] = 0
) -> None:
    """Runs and prints."""
    with tempfile.TemporaryDirectory() as directory:
        report = soak(write_chat_model(Path(directory)), requests, seed)
    print(f"{sum(report.counts.values())} requests in {report.seconds:.0f} s: {dict(report.counts)}")
    print(f"memory, MB: {' '.join(f'{m:.0f}' for m in report.memory)}")
    print(f"wrong: {len(report.wrong)}", *report.wrong[:10], sep="\n  ")
    print(f"logged: {len(report.logged)}", *report.logged[:10], sep="\n  ")
    raise SystemExit(bool(report.wrong or report.logged))


if __name__ == "__main__":
    typer.run(main)

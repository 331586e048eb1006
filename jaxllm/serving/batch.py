"""OpenAI's batch files: a JSONL file of requests to one of answers, resumable after any interruption.

Input: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {…}}
Output: {"id": "batch_req_0", "custom_id": "a", "response": {"status_code": 200, "request_id": …, "body": {…}},
"error": null}, in the order in which they are done. The number in `id` is the input's line, from 0; what the output
holds already is not done again. A line goes out whole; a torn last one is cut off and done again.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from jaxllm.errors import ConfigError, EngineDeadError
from jaxllm.serving.chat import chat
from jaxllm.serving.completions import complete
from jaxllm.serving.context import Context, numbered
from jaxllm.serving.embeddings import embed
from jaxllm.serving.errors import ApiError, api_error, refuse, validation_error
from jaxllm.serving.protocol.chat import ChatRequest
from jaxllm.serving.protocol.completions import CompletionRequest
from jaxllm.serving.protocol.embeddings import EmbeddingRequest
from jaxllm.serving.protocol.responses import ResponsesRequest
from jaxllm.serving.responses import respond_to
from jaxllm.serving.services import Services
from jaxllm.serving.streaming import Answer, collect, deadline, encode

Work = Callable[[Services, Context, Any], Awaitable[dict[str, Any]]]


def _generated(make: Callable[..., Awaitable[Answer]]) -> Work:
    """The whole body of an answer that is generated."""

    async def work(services: Services, context: Context, body: Any) -> dict[str, Any]:
        if body.stream:
            raise refuse("stream", True, "answers of a batch come whole")
        answer = await make(services, context, body)
        await answer.generation.start()
        return await collect(answer, deadline(services, context))

    return work


async def _embedded(services: Services, context: Context, body: EmbeddingRequest) -> dict[str, Any]:
    async with asyncio.timeout_at(deadline(services, context)):
        return await embed(services, context, body)


URLS: dict[str, tuple[type[BaseModel], Work]] = {
    "/v1/completions": (CompletionRequest, _generated(complete)),
    "/v1/chat/completions": (ChatRequest, _generated(chat)),
    "/v1/responses": (ResponsesRequest, _generated(respond_to)),
    "/v1/embeddings": (EmbeddingRequest, _embedded),
}
FIELDS = {"custom_id", "method", "url", "body"}
_ID = re.compile(r"batch_req_(\d+)")


@dataclasses.dataclass
class Tally:
    """What a run has done: rows answered with status 200, and with another."""

    good: int = 0
    failed: int = 0


class OutputFile:
    """The answers' file, locked for this process.

    Attributes:
      done: numbers of the input lines whose answers it holds.

    Raises ConfigError if another process writes it, or it holds other lines than answers.
    """

    def __init__(self, path: Path):
        self._path = path
        self.done: set[int] = set()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._recover()
        except BaseException:
            os.close(self._fd)
            raise

    def _recover(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output={str(self._path)!r}: another process is writing it") from None
        whole = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    os.ftruncate(self._fd, whole)
                    break
                try:
                    match = _ID.fullmatch(json.loads(line)["id"])
                except (ValueError, TypeError, KeyError):
                    match = None
                if match is None:
                    message = f"output={str(self._path)!r}: line {number} is no answer of a batch: move the file away"
                    raise ConfigError(message)
                self.done.add(int(match[1]))
                whole += len(line)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one line, whole."""
        view = memoryview(encode(row) + b"\n")
        while view:
            view = view[os.write(self._fd, view) :]

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *_: object) -> None:
        """To the disk, and unlocks."""
        os.fsync(self._fd)
        os.close(self._fd)


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if line.strip():
                yield number, line


def _parse(line: bytes, seen: set[str]) -> dict[str, Any]:
    """A row. Raises ApiError naming what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ApiError(400, "the line is not valid JSON", None, "invalid_json") from None
    if not isinstance(row, dict):
        raise ApiError(400, "the line is no JSON object", None, "invalid_json")
    for name in sorted(set(row) - FIELDS):
        raise ApiError(400, f"{name!a}: unknown field", ascii(name), "unknown_field")
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise refuse("custom_id", custom_id, "must be a non-empty string")
    if custom_id in seen:
        raise refuse("custom_id", custom_id, "must be unique in the file")
    seen.add(custom_id)
    if row.get("method", "POST") != "POST":
        raise refuse("method", row["method"], "must be 'POST'")
    if row.get("url") not in URLS:
        raise refuse("url", row.get("url"), f"must be one of {', '.join(URLS)}")
    return row


async def _answer(services: Services, context: Context, row: dict[str, Any]) -> dict[str, Any]:
    """The body of a row's answer. Raises what the endpoint would."""
    model, work = URLS[row["url"]]
    try:
        body = model.model_validate(row.get("body"))
    except ValidationError as error:
        raise validation_error(list(error.errors())) from None
    return await work(services, context, body)


async def _run_row(services: Services, number: int, line: bytes, seen: set[str]) -> dict[str, Any]:
    context = numbered(f"batch-{number}")
    custom_id, status = None, 200
    try:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            given = json.loads(line).get("custom_id")
            custom_id = given if isinstance(given, str) and given.isprintable() else None
        body = await _answer(services, context, _parse(line, seen))
    except EngineDeadError:
        raise
    except Exception as error:
        failure = api_error(error)
        if failure.status == 500 and failure is not error:
            raise
        body, status = failure.body(), failure.status
    response = {"status_code": status, "request_id": context.request_id, "body": body}
    return {"id": f"batch_req_{number}", "custom_id": custom_id, "response": response, "error": None}


async def run_batch(
    services: Services,
    source: Path,
    output: OutputFile,
    concurrency: int,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Answers every line of `source` that `output` does not hold yet, so many at a time.

    A bad line gets an answer that says so and stops nothing. Raises EngineDeadError.
    """
    tally, seen = Tally(), set[str]()
    tasks: set[asyncio.Task] = set()

    def settle(finished: set[asyncio.Task]) -> None:
        for task in finished:
            row = task.result()
            output.write(row)
            if row["response"]["status_code"] == 200:
                tally.good += 1
            else:
                tally.failed += 1
            progress(tally)

    try:
        for number, line in _rows(source):
            if number in output.done:
                with contextlib.suppress(ApiError):
                    _parse(line, seen)
                continue
            while len(tasks) >= concurrency:
                finished, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                settle(finished)
            tasks.add(asyncio.ensure_future(_run_row(services, number, line, seen)))
        while tasks:
            finished, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            settle(finished)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return tally

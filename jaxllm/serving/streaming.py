"""Answers: whole as JSON or as server-sent events, ended early when the client leaves or the deadline passes."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Coroutine
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxllm.frontend.outputs import CompletionOutput
from jaxllm.serving.context import Context
from jaxllm.serving.errors import ApiError, api_error
from jaxllm.serving.generation import ClientLeft, Generation
from jaxllm.serving.services import Services

logger = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must not wait for more
]
encode = msgspec.json.Encoder().encode


class Answer(Protocol):
    """What becomes of a generation's deltas."""

    generation: Generation
    stream: bool

    def begin(self) -> bytes:
        """The first events of a stream."""

    def events(self, index: int, delta: CompletionOutput) -> bytes:
        """A delta's events; may be empty."""

    def end(self) -> bytes:
        """The last events of a stream."""

    def add(self, index: int, delta: CompletionOutput) -> None:
        """Takes a delta in for `body`."""

    def body(self) -> dict[str, Any]:
        """The whole answer."""

    def error(self, error: ApiError) -> bytes:
        """The events of a stream that ends with an error."""


def event(data: object) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(data) + b"\n\n"


def json_response(data: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(encode(data), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """An error as a JSON answer."""
    return json_response(error.body(), error.status, error.headers())


def deadline(services: Services, context: Context) -> float | None:
    """When, on the event loop's clock, a request must have ended; its time counts from its arrival."""
    limits = [limit for limit in (services.config.request_timeout, context.timeout) if limit is not None]
    gone = time.perf_counter() - context.begin
    return asyncio.get_running_loop().time() + min(limits) - gone if limits else None


async def collect(answer: Answer, until: float | None = None) -> dict[str, Any]:
    """The whole answer of a started generation. Raises any of jaxllm.errors, TimeoutError."""
    try:
        async with asyncio.timeout_at(until):
            while deltas := await answer.generation.read():
                for index, delta in deltas:
                    answer.add(index, delta)
        return answer.body()
    finally:
        answer.generation.close()


async def respond(request: Request, services: Services, context: Context, answer: Answer) -> Response:
    """Starts the generation and answers. A client that leaves ends it."""
    until = deadline(services, context)
    if not answer.generation.has_grammar:
        await answer.generation.start()
    elif not await _while_there(request, context, _started(answer, until)):
        return Response(status_code=499)
    if answer.stream:
        return EventStream(answer, until)
    return await _unless_left(request, context, collect(answer, until))


async def _started(answer: Answer, until: float | None) -> None:
    async with asyncio.timeout_at(until):
        await answer.generation.start()


async def unless_left(
    request: Request, services: Services, context: Context, work: Coroutine[Any, Any, dict[str, Any]]
) -> Response:
    """The answer of work that is cancelled when the client leaves or the deadline passes (then TimeoutError)."""

    async def in_time() -> dict[str, Any]:
        async with asyncio.timeout_at(deadline(services, context)):
            return await work

    return await _unless_left(request, context, in_time())


async def _unless_left(request: Request, context: Context, body: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    work = asyncio.ensure_future(body)
    if await _while_there(request, context, work):
        return json_response(work.result())
    return Response(status_code=499)


async def _while_there(request: Request, context: Context, awaited: Awaitable[Any]) -> bool:
    """Awaits work that is cancelled when the client leaves; whether it got done. Raises what it raises."""
    work = asyncio.ensure_future(awaited)
    left = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            return True
        context.log["disconnected"] = True
        return False
    finally:
        left.cancel()
        work.cancel()
        await asyncio.gather(work, left, return_exceptions=True)


async def _left(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: one for each delta that the engine brings, sent at once.

    While the connection or the event loop is behind, deltas are merged by `AsyncLLM`, so that each send carries all
    that there is.
    """

    def __init__(self, answer: Answer, until: float | None):
        super().__init__()
        self._answer, self._until = answer, until

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._answer.generation
        left = asyncio.ensure_future(_left(receive))
        left.add_done_callback(lambda _: generation.cut_off())
        try:
            await self._write(send)
        except ClientLeft:
            pass
        finally:
            left.cancel()
            generation.close()

    async def _write(self, send: Send) -> None:
        answer = self._answer
        generation = answer.generation
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        try:
            data = answer.begin()
            async with asyncio.timeout_at(self._until):
                while deltas := await generation.read():
                    for index, delta in deltas:
                        data += answer.events(index, delta)
                    if data:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                        data = b""
            data += answer.end()
        except ClientLeft:
            raise
        except Exception as error:
            failure = api_error(error)
            if failure.status == 500 and failure is not error:
                logger.exception("a stream has failed")
            data = answer.error(failure)
        await send({"type": "http.response.body", "body": data, "more_body": False})

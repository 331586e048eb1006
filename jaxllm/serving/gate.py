"""What every request passes first and last: id, key, size of the body, one line in the log."""

import asyncio
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.serving import log
from jaxllm.serving.context import Context, asked_timeout, new_context
from jaxllm.serving.errors import ApiError, api_error
from jaxllm.serving.services import Services
from jaxllm.serving.streaming import error_response

logger = logging.getLogger("jaxllm.requests")
OPEN = frozenset({"/health", "/ready"})  # need no key
QUIET = OPEN | {"/metrics"}  # asked for all the time: not worth a line in the log
BODY_SECONDS = 60.0  # to send a body in


class Gate:
    """ASGI middleware around the whole application.

    Args:
      open_paths: further paths that need no key.
      admitted_paths: those that a full queue closes, before any work is spent on their bodies: when more comes than
        the server can take, refusals must cost next to nothing, or they are late and slow down who is served.
      admin_paths: those that need an admin key, and no other.
    """

    def __init__(
        self,
        app: ASGIApp,
        services: Services,
        open_paths: frozenset[str] = frozenset(),
        admitted_paths: frozenset[str] = frozenset(),
        admin_paths: frozenset[str] = frozenset(),
    ):
        self._app, self._services, self._open = app, services, OPEN | open_paths
        self._admitted, self._admin = admitted_paths, admin_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        context = scope["jaxllm.context"] = new_context(headers)
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", context.request_id.encode())]
            await send(message)

        try:
            self._let_in(scope, headers, context)
            body = await self._body(headers, receive)
            await self._app(scope, _replay(body, receive), sending)
        except asyncio.CancelledError:  # the server has waited for its requests long enough, and ends
            context.log["cut_off"] = True
        except Exception as error:
            failure = api_error(error)
            if failure.status == 500 and failure is not error:
                logger.exception("request %s", context.request_id)
            if not status:
                await error_response(failure)(scope, receive, sending)
            # It knows this frame by its traceback, and all that is in it: without a cycle all goes at once, while a
            # garbage collector with thousands of refused requests to free would stop everybody's streams.
            del failure
        finally:
            self._tell(scope, context, status)

    def _let_in(self, scope: Scope, headers: dict[bytes, bytes], context: Context) -> None:
        admin = scope["path"] in self._admin
        keys = self._services.admin_keys if admin else self._services.keys
        if admin and not keys.needed:
            raise ApiError(403, "admin routes are closed: start the server with --admin-api-key", None, "no_admin_key")
        if keys.needed and scope["path"] not in self._open and scope["method"] != "OPTIONS":
            context.key = keys.find(headers)
            if context.key is None:
                given = b"authorization" in headers or b"x-api-key" in headers
                message = "the API key is unknown" if given else "an API key is needed: Authorization: Bearer KEY"
                raise ApiError(401, message, None, "invalid_api_key")
        if scope["path"] in self._admitted and scope["method"] == "POST":
            self._services.admission.check(1)
        context.timeout = asked_timeout(headers)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises ApiError where it is too large."""
        most = self._services.config.max_body_bytes
        error = ApiError(413, f"the body has more than {most} bytes (--max-body-bytes)", None, "body_too_large")
        if headers.get(b"content-length", b"0").isdigit() and int(headers.get(b"content-length", b"0")) > most:
            raise error
        pieces, size, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before the end of the body", None, "disconnected")
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    more = message.get("more_body", False)
                    if size > most:
                        raise error
        except TimeoutError:
            late = f"the body has not come within {BODY_SECONDS:g} s"
            raise ApiError(408, late, None, "body_too_slow") from None
        return b"".join(pieces)

    def _tell(self, scope: Scope, context: Context, status: int) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._services.metrics.answered(route, status)
        if (scope["path"] in QUIET or scope["path"].startswith("/static/")) and status < 400:
            return
        log.event(
            logger,
            logging.INFO,
            "request",
            request_id=context.request_id,
            method=scope["method"],
            path=scope["path"],
            status=status,
            seconds=round(time.perf_counter() - context.begin, 6),
            key=context.key and context.key.name,
            **context.log,
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again

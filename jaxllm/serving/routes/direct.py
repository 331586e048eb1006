"""Routes past FastAPI's own way to an endpoint, which costs a lone request half a millisecond."""

import email.message
import functools
import json
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

from jaxllm.serving.errors import ApiError, validation_error


class DirectRoute(APIRoute):
    """A route that takes one JSON body, and answers with a Starlette response.

    FastAPI describes it in the schema like any other. What it runs is less: the body, which the gate has read whole, to
    the endpoint's model, and the endpoint with that. Errors go to the gate, which answers with them.

    The endpoint's parameters are `body`, annotated with its model, `request`, `services` and `context`.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._model: type[BaseModel] = self.endpoint.__annotations__["body"]
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
        message = await receive()  # the gate gives it in one piece
        response = await self.endpoint(
            body=body_of(self._model, content_type.decode("latin-1"), message["body"]),
            request=Request(scope, receive, send),
            services=scope["app"].state.services,
            context=scope["jaxllm.context"],
        )
        await response(scope, receive, send)


class Shortcut:
    """ASGI: hands POSTs of direct routes to them, and all else to FastAPI."""

    def __init__(self, app: FastAPI, routes: Iterable[DirectRoute]):
        self._app, self._routes = app, {route.path: route for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["app"], scope["route"] = self._app, route
        await route.app(scope, receive, send)


def body_of[Model: BaseModel](model: type[Model], content_type: str, body: bytes) -> Model:
    """The body as its model. Raises ApiError, in the words of `errors.validation_error`."""
    if not body:
        raise validation_error([{"type": "missing", "loc": ()}])
    if not _is_json(content_type):
        raise validation_error([{"type": "media_type", "loc": (), "input": body}])
    try:
        return model.model_validate(json.loads(body), from_attributes=True)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False)) from None
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON", None, "invalid_json") from None


@functools.lru_cache(256)
def _is_json(content_type: str) -> bool:
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))

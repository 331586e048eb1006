"""What endpoints take from the request."""

from typing import Annotated

from fastapi import Depends, Request

from jaxllm.serving.context import Context
from jaxllm.serving.services import Services


def _services(request: Request) -> Services:
    return request.app.state.services


def _context(request: Request) -> Context:
    return request.scope["jaxllm.context"]


ServicesOf = Annotated[Services, Depends(_services)]
ContextOf = Annotated[Context, Depends(_context)]

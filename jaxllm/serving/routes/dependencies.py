"""What endpoints take from the request. Coroutine functions: FastAPI would run others on a thread."""

from typing import Annotated

from fastapi import Depends, Request

from jaxllm.serving.context import Context
from jaxllm.serving.services import Services


async def _services(request: Request) -> Services:
    return request.app.state.services


async def _context(request: Request) -> Context:
    return request.scope["jaxllm.context"]


ServicesOf = Annotated[Services, Depends(_services)]
ContextOf = Annotated[Context, Depends(_context)]

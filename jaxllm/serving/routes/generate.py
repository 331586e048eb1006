"""POST /v1/completions, /v1/chat/completions and /v1/responses."""

from fastapi import APIRouter, Request, Response

from jaxllm.serving.chat import chat
from jaxllm.serving.completions import complete
from jaxllm.serving.protocol.chat import ChatRequest
from jaxllm.serving.protocol.completions import CompletionRequest
from jaxllm.serving.protocol.responses import ResponsesRequest
from jaxllm.serving.responses import respond_to
from jaxllm.serving.routes.dependencies import ContextOf, ServicesOf
from jaxllm.serving.routes.direct import DirectRoute
from jaxllm.serving.streaming import respond

router = APIRouter(route_class=DirectRoute)


@router.post("/v1/completions")
async def create_completion(
    body: CompletionRequest, request: Request, services: ServicesOf, context: ContextOf
) -> Response:
    """Completes prompts."""
    return await respond(request, services, context, await complete(services, context, body))


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, services: ServicesOf, context: ContextOf
) -> Response:
    """Answers a conversation."""
    return await respond(request, services, context, await chat(services, context, body))


@router.post("/v1/responses")
async def create_response(
    body: ResponsesRequest, request: Request, services: ServicesOf, context: ContextOf
) -> Response:
    """Answers input items with output items."""
    return await respond(request, services, context, await respond_to(services, context, body))


ROUTES = [route for route in router.routes if isinstance(route, DirectRoute)]
PATHS = frozenset(route.path for route in ROUTES)

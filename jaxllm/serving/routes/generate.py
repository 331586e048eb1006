"""POST /v1/completions and /v1/chat/completions."""

from fastapi import APIRouter, Request, Response

from jaxllm.serving.chat import chat
from jaxllm.serving.completions import complete
from jaxllm.serving.protocol.chat import ChatRequest
from jaxllm.serving.protocol.completions import CompletionRequest
from jaxllm.serving.routes.dependencies import ContextOf, ServicesOf
from jaxllm.serving.streaming import respond

router = APIRouter()


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

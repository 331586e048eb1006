"""POST /v1/embeddings."""

from fastapi import APIRouter, Request, Response

from jaxllm.serving.embeddings import embed
from jaxllm.serving.protocol.embeddings import EmbeddingRequest
from jaxllm.serving.routes.dependencies import ContextOf, ServicesOf
from jaxllm.serving.streaming import unless_left

router = APIRouter()


@router.post("/v1/embeddings")
async def create_embeddings(
    body: EmbeddingRequest, request: Request, services: ServicesOf, context: ContextOf
) -> Response:
    """One vector for each input."""
    return await unless_left(request, services, context, embed(services, context, body))


PATHS = frozenset(route.path for route in router.routes)  # type: ignore[attr-defined]

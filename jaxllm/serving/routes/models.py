"""GET /v1/models."""

from typing import Any

from fastapi import APIRouter

from jaxllm.serving.routes.dependencies import ServicesOf
from jaxllm.serving.services import Services

router = APIRouter()


def _card(services: Services, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": services.created,
        "owned_by": "jaxllm",
        "root": services.names[0],
        "parent": None,
        "max_model_len": services.llm.max_model_len,
    }


@router.get("/v1/models")
async def list_models(services: ServicesOf) -> dict[str, Any]:
    """The model under its names."""
    return {"object": "list", "data": [_card(services, name) for name in services.names]}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, services: ServicesOf) -> dict[str, Any]:
    """One of them."""
    services.model(model)
    return _card(services, model)

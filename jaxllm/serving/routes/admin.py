"""What only operators may do, under keys of their own: POST /reset_prefix_cache. Routes of adapters are refused."""

import logging
from typing import Any

from fastapi import APIRouter

from jaxllm.serving import log
from jaxllm.serving.errors import ApiError
from jaxllm.serving.routes.dependencies import ContextOf, ServicesOf

logger = logging.getLogger(__name__)
router = APIRouter()


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(services: ServicesOf, context: ContextOf) -> dict[str, Any]:
    """Forgets all cached prefixes; pages of requests under way stay theirs."""
    await services.llm.reset_prefix_cache()
    log.event(logger, logging.WARNING, "prefix cache reset", request_id=context.request_id)
    return {"status": "ok"}


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter() -> None:
    """Refused."""
    raise _no_adapters("load_lora_adapter")


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter() -> None:
    """Refused."""
    raise _no_adapters("unload_lora_adapter")


def _no_adapters(name: str) -> ApiError:
    return ApiError(400, f"{name}: this engine has no LoRA adapters", None, "unsupported")


PATHS = frozenset(route.path for route in router.routes)  # type: ignore[attr-defined]

"""What operators ask: /health, /ready, /metrics, /version."""

import asyncio
import contextlib
import importlib.metadata
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from jaxllm.errors import JaxllmError
from jaxllm.serving.admission import LONGEST_RETRY
from jaxllm.serving.errors import ApiError
from jaxllm.serving.routes.dependencies import ServicesOf

FRESH_SECONDS = 0.5  # that a scrape waits for the engine's figures
router = APIRouter()


@router.get("/health")
async def health(services: ServicesOf) -> dict[str, Any]:
    """200 while the engine gives signs of life, else 503."""
    services.heartbeat.check()
    return {"status": "ok", "heartbeat_age_s": round(services.heartbeat.age, 3)}


@router.get("/ready")
async def ready(services: ServicesOf) -> dict[str, Any]:
    """200 while new requests are taken, else 503: for load balancers."""
    services.heartbeat.check()
    if services.admission.draining:
        raise ApiError(503, "the server is shutting down", None, "draining", retry_after=LONGEST_RETRY)
    return {"status": "ready"}


@router.get("/metrics")
async def metrics(services: ServicesOf) -> Response:
    """Prometheus's text format; of an engine that is busy, the figures of its last heartbeat."""
    with contextlib.suppress(TimeoutError, JaxllmError, RuntimeError):
        await asyncio.wait_for(services.heartbeat.beat(), FRESH_SECONDS)
    return Response(generate_latest(services.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def version() -> dict[str, str]:
    """jaxllm's."""
    try:
        return {"version": importlib.metadata.version("jaxllm")}
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {"version": "unknown"}

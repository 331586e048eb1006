"""What operators ask: /health, /ready, /metrics, /version."""

import importlib.metadata
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from jaxllm.serving.errors import ApiError
from jaxllm.serving.routes.dependencies import ServicesOf

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
        raise ApiError(503, "the server is shutting down", None, "draining")
    return {"status": "ready"}


@router.get("/metrics")
async def metrics(services: ServicesOf) -> Response:
    """Prometheus's text format."""
    return Response(generate_latest(services.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def version() -> dict[str, str]:
    """jaxllm's."""
    try:
        return {"version": importlib.metadata.version("jaxllm")}
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {"version": "unknown"}

"""The application: endpoints, the forms of errors, the gate."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from jaxllm.async_llm import AsyncLLM
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.serving.admission import Admission
from jaxllm.serving.auth import load_admin_keys, load_keys
from jaxllm.serving.config import ServerConfig
from jaxllm.serving.errors import ApiError, api_error, validation_error
from jaxllm.serving.gate import Gate
from jaxllm.serving.heartbeat import Heartbeat
from jaxllm.serving.metrics import Metrics
from jaxllm.serving.reasoning import reasoning_style
from jaxllm.serving.routes import admin, embeddings, generate, models, operations, page, tokenize
from jaxllm.serving.routes.direct import Shortcut
from jaxllm.serving.services import Services
from jaxllm.serving.streaming import error_response
from jaxllm.serving.tools import tool_parser
from jaxllm.serving.tracing import check_tracing, open_tracing


def check(config: ServerConfig) -> None:
    """Raises ConfigError for what can be refused before the engine starts."""
    load_admin_keys(config)
    if config.otlp_traces_endpoint is not None:
        check_tracing(config.otlp_traces_endpoint)
    if config.tool_call_parser is not None:
        tool_parser(config.tool_call_parser)
    if config.reasoning_parser is not None:
        reasoning_style(config.reasoning_parser)
    if any(not name for name in config.served_model_name):
        raise ConfigError("served_model_name='': must not be empty")


def make_services(llm: AsyncLLM, config: ServerConfig) -> Services:
    """A server's parts around an engine. Raises ConfigError."""
    check(config)
    admission = Admission(llm.max_num_seqs, config.max_queued_requests, config.max_queued_tokens)
    heartbeat = Heartbeat(llm, config.health_timeout)
    names = list(config.served_model_name) or [llm.config.model]

    def figures() -> dict[str, Any]:
        return heartbeat.stats | {"restarts": llm.num_restarts}

    metrics = Metrics(names[0], figures, lambda: (admission.samples, admission.waiting_tokens))
    template = None if config.chat_template is None else Path(config.chat_template).read_text()
    endpoint = config.otlp_traces_endpoint
    tracing = None if endpoint is None else open_tracing(endpoint, names[0])
    keys, admin_keys = load_keys(config), load_admin_keys(config)
    return Services(llm, config, names, keys, admission, heartbeat, metrics, admin_keys, template, tracing)


def make_app(services: Services) -> ASGIApp:
    """The ASGI application of these parts."""
    # No pages with documentation: they would fetch scripts from elsewhere. /openapi.json is there.
    app = FastAPI(title="jaxllm", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = services
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for kind in (ApiError, JaxllmError, TimeoutError, Exception):
        app.add_exception_handler(kind, _failed)
    for module in (generate, embeddings, models, tokenize, operations, admin, page):
        app.include_router(module.router)
    short = Shortcut(app, generate.ROUTES)
    inner: ASGIApp = Gate(short, services, page.OPEN_PATHS, generate.PATHS | embeddings.PATHS, admin.PATHS)
    if services.config.allowed_origins:
        origins = list(services.config.allowed_origins)
        inner = CORSMiddleware(inner, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return inner


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(validation_error(list(error.errors())))


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, messages = request.url.path, {404: "no such endpoint", 405: f"{request.method} is not allowed here"}
    response = error_response(ApiError(error.status_code, f"{path}: {messages.get(error.status_code, error.detail)}"))
    response.headers.update(error.headers or {})  # 405's Allow
    return response


def _failed(request: Request, error: Exception) -> Response:
    return error_response(api_error(error))

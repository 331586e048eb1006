"""Every option of the server, with its default, its check and its help."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxllm.errors import ConfigError


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(kw_only=True)
class ServerConfig:
    """Options of one server. The help texts are the documentation of each field.

    Raises ConfigError naming the field, its value and its limit.
    """

    host: str = _option("127.0.0.1", "address to listen on; 0.0.0.0 for all")
    port: int = _option(8000, "port to listen on; 0 takes a free one")
    served_model_name: Sequence[str] = _option(
        (), "name(s) of the model in requests and answers (default: the model's own)"
    )
    api_key: Sequence[str] = _option((), "key(s) that clients must send; also read from $JAXLLM_API_KEY")
    api_key_file: str | None = _option(None, "file with one key a line, out of sight of the process list")
    admin_api_key: Sequence[str] = _option(
        (), "key(s) of the admin routes, which nobody may use without; also read from $JAXLLM_ADMIN_API_KEY"
    )
    allowed_origins: Sequence[str] = _option((), "origins of web pages that may call the API (CORS); '*' for all")
    chat_template: str | None = _option(None, "file with a Jinja chat template in place of the model's own")
    tool_call_parser: str | None = _option(None, "how the model writes tool calls: see docs/serving.md")
    enable_auto_tool_choice: bool = _option(False, "let the model call tools by itself; implied by a tool-call parser")
    reasoning_parser: str | None = _option(None, "how the model writes its reasoning: see docs/serving.md")
    max_queued_requests: int = _option(1024, "samples that may wait beyond the running ones; more get status 429")
    max_queued_tokens: int = _option(4_000_000, "prompt tokens that may wait for their first output token")
    max_n: int = _option(128, "most samples of one prompt")
    max_prompts: int = _option(1024, "most prompts times samples of one completions request")
    max_body_bytes: int = _option(16 << 20, "largest request body")
    max_logprobs: int = _option(20, "most alternatives a position that requests may ask for; -1: no limit")
    request_timeout: float | None = _option(None, "seconds after which a request ends with an error; None: no limit")
    drain_timeout: float = _option(60.0, "seconds that requests under way get to end after SIGTERM")
    health_timeout: float = _option(60.0, "seconds without a sign of life of the engine after which /health fails")
    otlp_traces_endpoint: str | None = _option(None, "address of an OpenTelemetry collector; needs the extra otel")
    log_level: Literal["debug", "info", "warning", "error"] = _option("info", "least severe messages that are logged")
    log_format: Literal["auto", "json", "text"] = _option("auto", "one JSON object a line; at a terminal plain text")

    def __post_init__(self) -> None:
        def need(holds: bool, field: str, limit: str) -> None:
            if not holds:
                shown = "…" if "api_key" in field and field != "api_key_file" else repr(getattr(self, field))
                raise ConfigError(f"{field}={shown}: {limit}")

        need(isinstance(self.port, int) and 0 <= self.port < 65536, "port", "must be in [0, 65535]")
        for field in ("max_n", "max_prompts", "max_body_bytes", "max_queued_tokens"):
            value = getattr(self, field)
            need(isinstance(value, int) and value >= 1, field, "must be an integer of at least 1")
        need(self.max_queued_requests >= 0, "max_queued_requests", "must be at least 0")
        need(self.max_logprobs >= -1, "max_logprobs", "must be at least 0, or -1 for no limit")
        for field in ("request_timeout", "drain_timeout", "health_timeout"):
            value = getattr(self, field)
            need(value is None or value > 0, field, "must be above 0 seconds")
        for field in ("api_key", "admin_api_key"):
            for key in getattr(self, field):
                need(bool(key) and key.isascii() and key.isprintable(), field, "must be printable ASCII, not empty")
        if self.enable_auto_tool_choice:
            need(self.tool_call_parser is not None, "enable_auto_tool_choice", "needs tool_call_parser")
        for field in ("chat_template", "api_key_file"):
            path = getattr(self, field)
            need(path is None or Path(path).is_file(), field, "no such file")

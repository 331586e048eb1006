"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.errors import ConfigError, EngineDeadError, InvalidRequestError, QueueFullError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


@dataclasses.dataclass
class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: of HTTP.
      message: what is wrong, with the field and the limit.
      param: the field at fault.
      code: for programs.
      retry_after: seconds, for the Retry-After header.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The answer's own headers."""
        found = {}
        if self.retry_after is not None:
            found["retry-after"] = str(self.retry_after)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


def refuse(field: str, value: object, limit: str, code: str = "invalid_value") -> ApiError:
    """Status 400 for a field, in the words of `InvalidRequestError`."""
    return ApiError(400, str(InvalidRequestError(field, value, limit)), field, code)


# The engine's names of what a client calls otherwise.
_FIELDS = {"prompt_token_ids": "prompt"}


def api_error(error: BaseException, names: Mapping[str, str] | None = None) -> ApiError:
    """What a client gets for an exception; `names` are the request's own names of fields of `SamplingParams`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        field = (names or {}).get(error.field, _FIELDS.get(error.field, error.field))
        code = "context_length_exceeded" if "max_model_len" in error.limit else "invalid_value"
        return ApiError(400, _clean(f"{field}{str(error).removeprefix(error.field)}"), field, code)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), None, "queue_full", retry_after=1)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), None, "engine_dead")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request has passed its deadline", None, "timeout")
    if isinstance(error, ConfigError):
        return ApiError(400, _clean(str(error)), None, "invalid_value")
    return ApiError(500, "internal error; the server's log has more under this request's id", None, "internal_error")


def _clean(text: str) -> str:
    """Half surrogate pairs, which no JSON can hold, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def validation_error(problems: list[Any]) -> ApiError:
    """Status 400 (415 for a body of another type) for the first problem that pydantic found, named by its path."""
    first = problems[0]
    context = first.get("ctx") or {}
    location = [part for part in first["loc"] if part != "body"] + ([context["field"]] if "field" in context else [])
    field = ""
    for part in location:
        field += f"[{part}]" if isinstance(part, int) else ("." if field else "") + str(part)
    kind = first["type"]
    if isinstance(first.get("input"), bytes):
        message = "the body must come with content-type: application/json"
        return ApiError(415, message, None, "unsupported_media_type")
    if kind == "extra_forbidden":
        return ApiError(400, _clean(f"{field}: unknown field"), _clean(field), "unknown_field")
    if kind == "json_invalid":
        return ApiError(400, "the body is not valid JSON", None, "invalid_json")
    if kind == "missing":
        return ApiError(400, f"{field or 'body'}: is required", field or None, "missing_field")
    code = "unsupported" if kind == "unsupported" else "invalid_value"
    shown = repr(context["value"] if "value" in context else first.get("input"))
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return ApiError(400, _clean(f"{field or 'body'}={shown}: {first['msg']}"), _clean(field) or None, code)

"""What the server knows of a request beside its body."""

import dataclasses
import itertools
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from jaxllm.serving.auth import ApiKey
from jaxllm.serving.errors import refuse
from jaxllm.serving.tracing import HEADERS

_SAFE_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
_numbers = itertools.count()


@dataclasses.dataclass
class Context:
    """One HTTP request, or one line of a batch file.

    Attributes:
      request_id: for logs and the answer's X-Request-Id: the client's own, or drawn.
      number: unique in this process.
      key: whose request it is; None where no key is needed.
      begin: seconds of time.perf_counter at its arrival.
      timeout: seconds after which it ends with an error, as the client asked in X-Request-Timeout.
      caller: the W3C headers of the caller's trace, if there were any.
      log: what the line in the log will say beside that.
    """

    request_id: str
    number: int
    key: ApiKey | None = None
    begin: float = dataclasses.field(default_factory=time.perf_counter)
    timeout: float | None = None
    caller: dict[str, str] = dataclasses.field(default_factory=dict)
    log: dict[str, Any] = dataclasses.field(default_factory=dict)

    def cache_salt(self, asked: str | None) -> str:
        """The prefix cache's salt: requests of different keys share nothing, whatever they ask for."""
        if self.key is None:
            return asked or ""
        return f"{self.key.salt}:{asked or ''}"


def numbered(request_id: str) -> Context:
    """A context with a number of its own."""
    return Context(request_id, next(_numbers))


def new_context(headers: Mapping[bytes, bytes]) -> Context:
    """A context with the client's X-Request-Id if it is harmless, else a drawn one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    context = numbered(given if given and _SAFE_ID.fullmatch(given) else secrets.token_hex(16))
    context.caller = {name.decode(): headers[name].decode("latin-1") for name in HEADERS if name in headers}
    return context


def asked_timeout(headers: Mapping[bytes, bytes]) -> float | None:
    """Seconds in X-Request-Timeout. Raises ApiError where it is no positive number."""
    given = headers.get(b"x-request-timeout")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise refuse("X-Request-Timeout", given.decode("latin-1"), "must be seconds above 0")
    return seconds

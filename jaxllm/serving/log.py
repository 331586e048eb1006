"""Logs: one line an event, as JSON or as text, with the request's id. Prompts, outputs and keys are never logged."""

import logging
import logging.config
import sys
import time
from typing import Any

import msgspec

_FIELDS = "fields"  # the attribute of a log record that holds `event`'s fields


def event(logger: logging.Logger, level: int, message: str, **fields: Any) -> None:
    """Logs a message with fields of its own."""
    if logger.isEnabledFor(level):
        logger.log(level, message, extra={_FIELDS: fields})


class JsonFormatter(logging.Formatter):
    """{"time", "level", "logger", "message", …} on a line; time in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{second}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return msgspec.json.encode(line, enc_hook=repr).decode()
        except UnicodeEncodeError:  # half a surrogate pair
            return msgspec.json.encode({"level": line["level"], "message": ascii(line)}).decode()


class TextFormatter(logging.Formatter):
    """TIME LEVEL logger: message field=value …"""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in getattr(record, _FIELDS, {}).items())
        return super().format(record) + fields


def set_up_logging(level: str, format: str) -> None:
    """Sends everything that this process logs to stderr in one format; "auto": text at a terminal, else JSON."""
    handler = logging.StreamHandler(sys.stderr)
    if format == "json" or (format == "auto" and not sys.stderr.isatty()):
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # Found out for each line, and shown by none: half of what a line costs, when thousands a second are refused.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.logAsyncioTasks = False  # type: ignore[attr-defined]
    logging._srcfile = None  # as "Optimization" in logging's documentation says
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.getLogger("uvicorn.access").disabled = True  # the server logs its requests itself, with their ids

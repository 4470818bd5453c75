"""What a service and its workers log: lines for people, or one JSON object a line for programs.

    {"time": …, "level": "info", "logger": "registry.access", "message": "GET … 200", "request_id": …, "route": …}

Whatever is logged while a request is served carries the request's id, which its answer has as X-Request-ID. Fields
beside the message are given as ``extra={"fields": {…}}``. Both forms are redacted as they are written.
"""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from registry.redaction import RedactingFormatter, redact

__all__ = ["LOG_FORMATS", "REQUEST_ID", "JsonFormatter", "log_config"]

LOG_FORMATS = ("text", "json")
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
LOGGERS = ("uvicorn", "uvicorn.error", "registry")


class JsonFormatter(logging.Formatter):
    """One JSON object a line, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger and message; the request's id; the fields of the record; a traceback as one string."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := REQUEST_ID.get()) is not None:
            line["request_id"] = request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, ensure_ascii=False, default=str))


def log_config(form: str, level: str = "info") -> dict[str, Any]:
    """For logging.config.dictConfig: uvicorn's messages and the registry's on stderr, in one of LOG_FORMATS."""
    text = {"()": RedactingFormatter, "fmt": "%(asctime)s %(levelname)s %(name)s %(message)s"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": text if form == "text" else {"()": JsonFormatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {name: {"level": level.upper()} for name in LOGGERS},
    }

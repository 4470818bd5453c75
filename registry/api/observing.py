"""Every request is counted and logged: one line with its id, route, status, time, bytes and who asked.

The id is the caller's X-Request-ID where that is a plain word, else a new one; the answer names it. Queries are not
logged, because signed URLs carry their permission there, and neither are headers. What asks for the service's health
is counted, and logged at the level DEBUG only.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.api.metrics import Metrics
from registry.logs import REQUEST_ID

__all__ = ["Observed"]

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
PROBES = frozenset({"/healthz", "/api/v1/health", "/api/v1/ready", "/metrics"})

log = logging.getLogger("registry.access")


class Observed:
    """ASGI middleware, the outermost one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, prefix: str) -> None:
        self.app = app
        self._metrics = metrics
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and write down how it went."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        received = sent = 0
        status = 500  # of a failure that no handler below turns into an answer

        async def take() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def give(message: Message) -> None:
            nonlocal sent, status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            sent += len(message.get("body", b""))
            await send(message)

        token, started = REQUEST_ID.set(request_id), time.perf_counter()
        try:
            with self._metrics.in_progress.track_inprogress():
                await self.app(scope, take, give)
        finally:
            self._note(scope, status, time.perf_counter() - started, received, sent)
            REQUEST_ID.reset(token)

    def _template(self, scope: Scope) -> str:
        """The path of the route that served the request; some versions of FastAPI leave a router's prefix out of it."""
        path = str(getattr(scope.get("route"), "path", ""))
        if not path:
            return "unmatched"
        prefixed = scope["path"].startswith(self._prefix) and not path.startswith(self._prefix)
        return f"{self._prefix}{path}" if prefixed else path

    def _note(self, scope: Scope, status: int, seconds: float, received: int, sent: int) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = self._template(scope)
        self._metrics.observe(method, route, status, seconds, received, sent)
        principal = scope.get("state", {}).get("principal")
        fields: dict[str, Any] = {
            "method": method,
            "path": scope["path"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            "bytes_in": received,
            "bytes_out": sent,
            "subject": principal and principal.subject,
            "token": principal and principal.token,
            "client": scope["client"][0] if scope.get("client") else None,
        }
        log.log(
            logging.DEBUG if scope["path"] in PROBES else logging.INFO,
            "%s %r %s, %s ms, %s bytes in, %s out, %s",
            method, scope["path"], status, fields["ms"], received, sent, fields["subject"] or "nobody",
            extra={"fields": fields},
        )  # fmt: skip

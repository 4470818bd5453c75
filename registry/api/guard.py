"""Keeps other web pages away from a service without tokens.

A page that a browser shows may send requests to 127.0.0.1, and a name that its owner points there reaches it too. So
a request whose Origin is not this service is refused, and, where `hosts` is given, one that asks for another host.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from composer.errors import PolicyError
from registry.api.failures import error_response

__all__ = ["LOOPBACK_HOSTS", "SameOrigin"]

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})


class SameOrigin:
    """ASGI middleware: 403 for requests from elsewhere."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None = None) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http" and (error := self._refuse(Headers(scope=scope))):
            await error_response(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refuse(self, headers: Headers) -> PolicyError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            origin_host = urlsplit(origin).netloc if origin else host
        except ValueError:
            name, origin_host = "", ""
        if self.hosts is not None and name not in self.hosts:
            return PolicyError(
                f"this service does not answer for the host {host!r}",
                expected=sorted(self.hosts),
                found=host,
                remedy="use the address that 'registry serve' printed",
            )
        if origin_host != host:
            return PolicyError(
                "requests from other web pages are refused", expected=host, found=origin, remedy="use the API directly"
            )
        return None

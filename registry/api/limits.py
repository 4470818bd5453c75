"""Limits on requests: how many of one caller, and how large a body may be that is read into memory.

A caller is a token that was recognised, or an address. Each has a bucket that holds a minute's worth of requests and
fills steadily, so a burst is served and a flood is not; guesses at tokens count against the address.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from math import ceil

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.api.failures import error_response
from registry.api.rules import UploadTooLargeError
from registry.errors import RateLimitError

__all__ = ["MAX_BODY_BYTES", "BodyLimit", "RateLimit"]

MAX_BODY_BYTES = 2 << 20
# What is streamed to the store, and limited there (--max-upload).
STREAMED = re.compile(r"/api/v1/(bases|adapters)|/api/models/.+/commit/[^/]+|/lfs/[^/]+|/xet/v1/.+")
REMEMBERED = 10_000


class RateLimit:
    """One bucket a caller, within one process."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = float(per_minute)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, caller: str) -> None:
        """Count one request. Raises RateLimitError, with the seconds to wait, when the bucket is empty."""
        with self._lock:
            now = self._clock()
            left, at = self._buckets.pop(caller, (self._size, now))
            left = min(self._size, left + (now - at) * self._size / 60)
            self._buckets[caller] = (left - 1 if left >= 1 else left, now)
            if len(self._buckets) > REMEMBERED:
                self._buckets.popitem(last=False)
        if left < 1:
            wait = ceil((1 - left) * 60 / self._size)
            raise RateLimitError(
                "too many requests",
                expected=f"at most {self._size:.0f} a minute",
                remedy=f"wait {wait} s",
                retry_after=wait,
            )


class BodyLimit:
    """ASGI middleware: 413 for a body that is too large, where it is not streamed to the store."""

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse by the declared length, or by what really comes."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if scope["type"] != "http" or STREAMED.fullmatch(scope["path"]):
            await self.app(scope, receive, send)
            return
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            error = UploadTooLargeError("the body is too large", expected=f"{self._limit} bytes", found=declared)
            await error_response(error)(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:  # FastAPI passes no other exception on while it reads a body
                raise HTTPException(413, f"the body is larger than {self._limit} bytes")
            return message

        await self.app(scope, counted, send)

"""Failures as the Hub's clients read them: a code that picks their exception, and a message that they show.

X-Error-Code      RepoNotFound, RevisionNotFound, EntryNotFound
X-Error-Message   one line of ASCII, the same as {"error": …} in the body
X-Repo-Commit     beside EntryNotFound, so that a client may remember that the commit has no such file
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from composer.errors import TypedError, UsageError
from registry.api.failures import log_failure, status_of
from registry.errors import (
    AdapterNotFoundError,
    AuthenticationError,
    BaseNotFoundError,
    EntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    VersionNotFoundError,
)

__all__ = ["HubRoute", "header_text", "hub_error"]

MAX_MESSAGE = 2000
CODES: tuple[tuple[tuple[type[TypedError], ...], str], ...] = (
    ((RepositoryNotFoundError, AdapterNotFoundError, BaseNotFoundError), "RepoNotFound"),
    ((RevisionNotFoundError, VersionNotFoundError), "RevisionNotFound"),
    ((EntryNotFoundError,), "EntryNotFound"),
)


class HubRoute(APIRoute):
    """A route whose typed failures are answered in the Hub's way."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with failures translated."""
        handle = super().get_route_handler()

        async def translated(request: Request) -> Response:
            try:
                return await handle(request)
            except TypedError as error:
                await run_in_threadpool(log_failure, request, error)
                return hub_error(error)
            except RequestValidationError as error:
                problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
                return hub_error(UsageError(problems))

        return translated


def hub_error(error: TypedError) -> JSONResponse:
    """The response to a typed failure."""
    text = header_text(f"{error.message}; {error.remedy}" if error.remedy else error.message)
    headers = {"X-Error-Message": text}
    for kinds, code in CODES:
        if isinstance(error, kinds):
            headers["X-Error-Code"] = code
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = 'Bearer realm="registry"'
    if "retry_after" in error.fields:
        headers["Retry-After"] = str(error.fields["retry_after"])
    if commit := error.fields.get("commit"):
        headers["X-Repo-Commit"] = commit
    return JSONResponse({"error": text}, status_of(error), headers=headers)


def header_text(text: str) -> str:
    """`text` as a header may hold it: one line of ASCII."""
    plain = text.replace("…", "...").replace("–", "-").replace("’", "'")
    return " ".join(plain.encode("ascii", "replace").decode().split())[:MAX_MESSAGE]

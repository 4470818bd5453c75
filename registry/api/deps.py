"""What routes are given: who asks, the registry and the jobs as they may see them, and file responses.

require(Scope.PUBLISH)    a dependency that refuses everybody else, and returns the Principal
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Query, Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from composer.errors import UsageError
from registry.access import LOCAL, Authenticator, Principal, Scope
from registry.api.files import VerifiedResponse
from registry.api.rules import refuse_path
from registry.errors import AuthenticationError
from registry.interface import DEFAULT_PAGE
from registry.schemas import SHOWS_PLACES, VersionInfo

if TYPE_CHECKING:
    from registry.services.jobs import JobService
    from registry.services.local import LocalRegistry

__all__ = [
    "AdapterName",
    "Cursor",
    "Jobs",
    "Limit",
    "Registered",
    "VersionQuery",
    "count_download",
    "file_response",
    "require",
    "usage_errors",
    "version_ref",
]

MAX_PAGE = 1000
WEIGHTS = (".safetensors", ".npz", ".gguf")


async def principal_of(request: Request) -> Principal:
    """Who asks. LOCAL where access is open. Raises AuthenticationError and RateLimitError."""
    if (found := getattr(request.state, "principal", None)) is None:
        rate_limit = request.app.state.rate_limit
        address = request.client.host if request.client else "unknown"
        try:
            found = await _authenticate(request)
        except AuthenticationError:
            if rate_limit:
                rate_limit.take(address)
            raise
        if rate_limit:
            rate_limit.take(found.token or address)
        request.state.principal = found
        SHOWS_PLACES.set(found.is_admin)
    return found


async def _authenticate(request: Request) -> Principal:
    authenticators: tuple[Authenticator, ...] | None = request.app.state.authenticators
    if authenticators is None:
        return LOCAL
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        for authenticator in authenticators:
            principal = await run_in_threadpool(authenticator.authenticate, credentials.strip())
            if principal is not None:
                return principal
    raise AuthenticationError(
        "this service needs a token",
        expected="Authorization: Bearer ar_…",
        found=scheme or "no Authorization header",
        remedy="set REGISTRY_TOKEN (HF_TOKEN for Hub clients); an admin makes one with 'registry token create'",
    )


def require(scope: Scope, *, everywhere: bool = False) -> Callable[..., Coroutine[Any, Any, Principal]]:
    """A dependency: the principal of the request, who has the scope. Raises AuthenticationError, ForbiddenError.

    everywhere: a token that is limited to namespaces is not enough.
    """

    async def check(principal: Annotated[Principal, Depends(principal_of)]) -> Principal:
        (principal.require_everywhere if everywhere else principal.require)(scope)
        return principal

    return check


async def _registry(request: Request, principal: Annotated[Principal, Depends(principal_of)]) -> Any:
    return request.app.state.registry.acting_as(principal)


async def _jobs(request: Request, principal: Annotated[Principal, Depends(principal_of)]) -> Any:
    return request.app.state.jobs.acting_as(principal)


async def _adapter_name(namespace: str, name: str) -> str:
    """``namespace/name`` of the URL's path."""
    return refuse_path(f"{namespace}/{name}", "the adapter")


if TYPE_CHECKING:
    Registered = LocalRegistry
    Jobs = JobService
else:
    Registered = Annotated[Any, Depends(_registry)]
    Jobs = Annotated[Any, Depends(_jobs)]

AdapterName = Annotated[str, Depends(_adapter_name)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="items a page")]
Cursor = Annotated[str | None, Query(description="the `next` of the page before")]
VersionQuery = Annotated[str | None, Query(description="a semantic version, an alias or sha256:…; default: the latest")]
DEFAULT_LIMIT = DEFAULT_PAGE


def version_ref(name: str, version: str | None) -> str:
    """``name`` or ``name@version``."""
    return f"{name}@{version}" if version else name


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn pydantic's complaint about a value that a request gave into a UsageError."""
    try:
        yield
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise UsageError("; ".join(problems), problems=problems) from None


def count_download(request: Request, registry: Registered, version: VersionInfo, filename: str) -> None:
    """One download of a version more, where a request gets its weights from their start."""
    if filename.endswith(WEIGHTS) and "range" not in request.headers:
        registry.count_download(version)


def file_response(
    request: Request,
    path: Path,
    name: str,
    sha256: str,
    *,
    oid: str | None = None,
    more: Mapping[str, str] | None = None,
) -> Response:
    """A download with Content-Length and ranges, of bytes that are checked as they are sent (registry.api.files).

    Its ETag is the digest, or the `oid` that a client knows the file by, so that a cache may ask again for nothing.
    more: headers to add.
    """
    etag = f'"{oid or sha256}"'
    headers = {"ETag": etag, "X-Content-Type-Options": "nosniff", **(more or {})}
    if etag in (tag.strip() for tag in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=headers)
    options: dict[str, Any] = {"media_type": "application/octet-stream", "filename": Path(name).name}
    return VerifiedResponse(path, request.app.state.registry.store.chunks, sha256, headers=headers, **options)

"""What routes are given: the registry, the jobs, references that name no local path, and file responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import ValidationError

from composer.errors import UsageError
from registry.api.rules import refuse_path
from registry.interface import DEFAULT_PAGE
from registry.names import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from registry.services.jobs import JobService
    from registry.services.local import LocalRegistry

__all__ = [
    "AdapterName",
    "Caller",
    "Cursor",
    "Jobs",
    "Limit",
    "Registered",
    "Scope",
    "VersionQuery",
    "file_response",
    "require",
    "usage_errors",
    "version_ref",
]

MAX_PAGE = 1000


class Scope(StrEnum):
    """What a caller may be allowed to do."""

    READ = "read"
    PUBLISH = "publish"
    COMPOSE = "compose"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks; `name` is the namespace of what is created without one."""

    name: str
    scopes: frozenset[Scope]


async def _registry(request: Request) -> Any:
    return request.app.state.registry


async def _jobs(request: Request) -> Any:
    return request.app.state.jobs


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


def require(scope: Scope) -> Any:
    """A dependency: the caller may do what `scope` names. Access is open on loopback, so whoever connects may."""

    async def caller(request: Request) -> Caller:
        return Caller(name=DEFAULT_NAMESPACE, scopes=frozenset(Scope))

    return Depends(caller)


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


def file_response(
    request: Request, path: Path, name: str, digest: str, more: Mapping[str, str] | None = None
) -> Response:
    """A download with Content-Length and ranges; its ETag is the digest, so that a cache may ask again for nothing.

    more: headers to add.
    """
    etag = f'"{digest}"'
    headers = {"ETag": etag, "X-Content-Type-Options": "nosniff", **(more or {})}
    if etag in (tag.strip() for tag in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=headers)
    return FileResponse(path, media_type="application/octet-stream", filename=Path(name).name, headers=headers)

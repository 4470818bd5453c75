"""Adapters: upload, list, search, versions, aliases, files."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from composer.errors import NotFoundError
from registry.api.deps import (
    DEFAULT_LIMIT,
    AdapterName,
    Cursor,
    Limit,
    Registered,
    VersionQuery,
    file_response,
    version_ref,
)
from registry.api.rules import refuse_path
from registry.api.schemas import AliasRequest, form_body
from registry.api.uploads import Upload, receive
from registry.schemas import BaseFit, Level, Page, PublishResult, Verdict, VersionInfo

router = APIRouter(tags=["adapters"])

ADAPTER = "/adapters/{namespace}/{name}"
UPLOAD = form_body(
    ("name",),
    name="namespace/name",
    version="a semantic version; default: the next one",
    base="a registered base, or the fingerprint (wf1:…) of one that need not be registered",
    license="an SPDX expression",
    tags="[]words to search for",
    description="one paragraph",
)


@router.post("/adapters", summary="Publish an adapter", status_code=201, openapi_extra=UPLOAD)
async def publish(request: Request, response: Response, registry: Registered) -> PublishResult:
    """Publish one version. 200 when these very bytes are that version already."""
    upload = await receive(request)
    result = await run_in_threadpool(_publish, upload, registry)
    response.status_code = 201 if result.created else 200
    response.headers["Location"] = f"/api/v1/adapters/{result.version.name}?version={result.version.version}"
    return result


def _publish(upload: Upload, registry: Registered) -> PublishResult:
    with upload:
        upload.only("name", "version", "base", "license", "tags", "description")
        base = upload.text("base")
        return registry.publish(
            upload.folder,
            name=refuse_path(upload.required("name"), "the name"),
            version=upload.text("version"),
            base=None if base is None else refuse_path(base, "the base"),
            license=upload.text("license"),
            tags=tuple(tag for tag in upload.fields.get("tags", ()) if tag),
            description=upload.text("description"),
            read_paths=False,
        )


@router.get("/adapters", summary="List adapters")
def list_adapters(
    registry: Registered,
    namespace: str | None = None,
    kind: Annotated[str | None, Query(description="such as lora")] = None,
    base: Annotated[str | None, Query(description="a registered base")] = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Page[VersionInfo]:
    """The latest version of each adapter, by name."""
    if base is not None:
        refuse_path(base, "the base")
    return registry.list_adapters(namespace=namespace, kind=kind, base=base, limit=limit, cursor=cursor)


@router.get("/search", summary="Search adapters")
def search(
    registry: Registered,
    q: Annotated[str, Query(min_length=1, description="words that must all be there")],
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Page[VersionInfo]:
    """Adapters whose name, description, tags, base or target modules hold every word."""
    return registry.search(q, limit=limit, cursor=cursor)


@router.get("/check", summary="Check one adapter against one base", tags=["compatibility"])
def check(
    registry: Registered,
    adapter: Annotated[str, Query(min_length=1)],
    base: Annotated[str, Query(min_length=1)],
) -> Verdict:
    """The level at which they fit, with reasons; incompatible is an answer, not a failure."""
    return registry.check(refuse_path(adapter, "the adapter"), refuse_path(base, "the base"))


@router.get(ADAPTER, summary="Show a version")
def get_version(adapter: AdapterName, registry: Registered, version: VersionQuery = None) -> VersionInfo:
    """The latest version, or the one asked for."""
    return registry.get_version(version_ref(adapter, version))


@router.get(f"{ADAPTER}/versions", summary="List versions")
def list_versions(adapter: AdapterName, registry: Registered) -> Page[VersionInfo]:
    """All versions of an adapter, newest first."""
    return Page[VersionInfo](items=registry.list_versions(adapter))


@router.put(f"{ADAPTER}/aliases/{{alias}}", summary="Point an alias at a version")
def set_alias(adapter: AdapterName, alias: str, body: AliasRequest, registry: Registered) -> VersionInfo:
    """Create the alias or move it."""
    return registry.set_alias(version_ref(adapter, body.version), alias)


@router.delete(f"{ADAPTER}/aliases/{{alias}}", summary="Remove an alias", status_code=204)
def delete_alias(adapter: AdapterName, alias: str, registry: Registered) -> None:
    """Remove the alias; the version stays."""
    registry.delete_alias(adapter, alias)


@router.get(f"{ADAPTER}/bases", summary="List the bases that an adapter fits", tags=["compatibility"])
def bases_for(
    adapter: AdapterName,
    registry: Registered,
    version: VersionQuery = None,
    level: Annotated[Level, Query(description="the weakest level that counts")] = Level.SHAPE,
) -> Page[BaseFit]:
    """Registered bases that fit at `level` or better, best first."""
    return Page[BaseFit](items=registry.bases_for(version_ref(adapter, version), level=level))


@router.get(f"{ADAPTER}/inspect", summary="Inspect a version")
def inspect(adapter: AdapterName, registry: Registered, version: VersionQuery = None) -> dict[str, Any]:
    """What a version holds, tensor by tensor."""
    info = registry.get_version(version_ref(adapter, version))
    return registry.inspect(f"{info.name}@{info.digest}")


@router.get(f"{ADAPTER}/files/{{filename:path}}", summary="Download a file of a version", response_class=Response)
def download(
    request: Request, adapter: AdapterName, filename: str, registry: Registered, version: VersionQuery = None
) -> Response:
    """One file; its ETag is the sha256 of its bytes."""
    info = registry.get_version(version_ref(adapter, version))
    entry = next((file for file in info.files if file.name == filename), None)
    if entry is None:
        raise NotFoundError(
            f"{info.name}@{info.version} has no file {filename!r}",
            expected=[file.name for file in info.files],
            found=filename,
        )
    path = registry.version_files(f"{info.name}@{info.digest}")[filename]
    return file_response(request, path, filename, entry.sha256)

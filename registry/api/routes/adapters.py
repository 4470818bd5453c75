"""Adapters: upload, list, search, versions, aliases, files."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from composer.errors import NotFoundError, UsageError
from registry.access import Scope
from registry.api.deps import (
    DEFAULT_LIMIT,
    AdapterName,
    Cursor,
    Limit,
    Registered,
    VersionQuery,
    count_download,
    file_response,
    require,
    version_ref,
)
from registry.api.rules import refuse_path
from registry.api.schemas import (
    AliasRequest,
    DeprecationRequest,
    ReasonRequest,
    SignatureRequest,
    VisibilityRequest,
    form_body,
)
from registry.api.uploads import Upload, receive
from registry.schemas import BaseFit, Level, Page, PublishResult, SignatureInfo, SignedBundle, Verdict, VersionInfo

router = APIRouter(tags=["adapters"])

PUBLISH = [Depends(require(Scope.PUBLISH))]
ADMIN = [Depends(require(Scope.ADMIN, everywhere=True))]
ADAPTER = "/adapters/{namespace}/{name}"
UPLOAD = form_body(
    ("name",),
    name="namespace/name",
    version="a semantic version; default: the next one",
    base="a registered base, or the fingerprint (wf1:…) of one that need not be registered",
    license="an SPDX expression",
    private="true: a new adapter is seen by members of its namespace only",
    allow_nonfinite="true: NaN and infinities in the weights are a warning and no error",
    tags="[]words to search for",
    description="one paragraph",
)


@router.post("/adapters", summary="Publish an adapter", status_code=201, openapi_extra=UPLOAD, dependencies=PUBLISH)
async def publish(request: Request, response: Response, registry: Registered) -> PublishResult:
    """Publish one version. 200 when these very bytes are that version already."""
    upload = await receive(request)
    result = await run_in_threadpool(_publish, upload, registry)
    response.status_code = 201 if result.created else 200
    response.headers["Location"] = f"/api/v1/adapters/{result.version.name}?version={result.version.version}"
    return result


def _publish(upload: Upload, registry: Registered) -> PublishResult:
    with upload:
        upload.only("name", "version", "base", "license", "tags", "description", "private", "allow_nonfinite")
        base = upload.text("base")
        return registry.publish(
            upload.folder,
            name=refuse_path(upload.required("name"), "the name"),
            version=upload.text("version"),
            base=None if base is None else refuse_path(base, "the base"),
            license=upload.text("license"),
            tags=tuple(tag for tag in upload.fields.get("tags", ()) if tag),
            description=upload.text("description"),
            private=_flag(upload.text("private"), "private"),
            allow_nonfinite=bool(_flag(upload.text("allow_nonfinite"), "allow_nonfinite")),
            read_paths=False,
        )


def _flag(text: str | None, name: str) -> bool | None:
    if text not in (None, "true", "false"):
        raise UsageError(f"{name} is {text!r}", expected="true or false", found=text)
    return None if text is None else text == "true"


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
    q: Annotated[str, Query(max_length=1000, description="beginnings of words that must all be there")] = "",
    namespace: str | None = None,
    kind: Annotated[str | None, Query(description="such as lora")] = None,
    rank: Annotated[int | None, Query(ge=1, le=1 << 16)] = None,
    task: Annotated[str | None, Query(description="such as CAUSAL_LM")] = None,
    license: Annotated[str | None, Query(description="an SPDX expression")] = None,
    base: Annotated[str | None, Query(description="a registered base")] = None,
    tag: str | None = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Page[VersionInfo]:
    """Latest versions with these properties, newest first."""
    if base is not None:
        refuse_path(base, "the base")
    return registry.search(
        q, namespace=namespace, kind=kind, rank=rank, task=task, license=license, base=base, tag=tag,
        limit=limit, cursor=cursor,
    )  # fmt: skip


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
def list_versions(
    adapter: AdapterName, registry: Registered, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> Page[VersionInfo]:
    """All versions of an adapter, the highest first."""
    return registry.list_versions(adapter, limit=limit, cursor=cursor)


@router.put(f"{ADAPTER}/aliases/{{alias}}", summary="Point an alias at a version", dependencies=PUBLISH)
def set_alias(adapter: AdapterName, alias: str, body: AliasRequest, registry: Registered) -> VersionInfo:
    """Create the alias or move it."""
    return registry.set_alias(version_ref(adapter, body.version), alias)


@router.delete(f"{ADAPTER}/aliases/{{alias}}", summary="Remove an alias", status_code=204, dependencies=PUBLISH)
def delete_alias(adapter: AdapterName, alias: str, registry: Registered) -> None:
    """Remove the alias; the version stays."""
    registry.delete_alias(adapter, alias)


@router.put(f"{ADAPTER}/visibility", summary="Hide or show an adapter", dependencies=PUBLISH)
def set_private(adapter: AdapterName, body: VisibilityRequest, registry: Registered) -> VersionInfo:
    """Private: only members of the namespace see it; to everybody else it does not exist."""
    return registry.set_private(adapter, body.private)


@router.put(f"{ADAPTER}/versions/{{version}}/yank", summary="Yank a version", dependencies=PUBLISH)
def yank(adapter: AdapterName, version: str, body: ReasonRequest, registry: Registered) -> VersionInfo:
    """Withdraw it: refused by name, still there by digest."""
    return registry.yank(version_ref(adapter, version), body.reason)


@router.delete(f"{ADAPTER}/versions/{{version}}/yank", summary="Publish a yanked version again", dependencies=PUBLISH)
def unyank(adapter: AdapterName, version: str, registry: Registered) -> VersionInfo:
    """Take the yank back."""
    return registry.yank(version_ref(adapter, version), None)


@router.put(f"{ADAPTER}/versions/{{version}}/deprecation", summary="Deprecate a version", dependencies=PUBLISH)
def deprecate(adapter: AdapterName, version: str, body: DeprecationRequest, registry: Registered) -> VersionInfo:
    """Warn all who use it, and name its successor."""
    successor = None if body.successor is None else refuse_path(body.successor, "the successor")
    return registry.deprecate(version_ref(adapter, version), body.reason, successor=successor)


@router.delete(f"{ADAPTER}/versions/{{version}}/deprecation", summary="Take a deprecation back", dependencies=PUBLISH)
def undeprecate(adapter: AdapterName, version: str, registry: Registered) -> VersionInfo:
    """Warn no longer."""
    return registry.deprecate(version_ref(adapter, version), None)


@router.put(f"{ADAPTER}/versions/{{version}}/quarantine", summary="Quarantine bytes", dependencies=ADMIN)
def quarantine(adapter: AdapterName, version: str, body: ReasonRequest, registry: Registered) -> Page[VersionInfo]:
    """Block the bytes of a version, whatever names them; the answer is all that is blocked."""
    return Page[VersionInfo](items=registry.quarantine(version_ref(adapter, version), body.reason))


@router.delete(f"{ADAPTER}/versions/{{version}}/quarantine", summary="Lift a quarantine", dependencies=ADMIN)
def lift(adapter: AdapterName, version: str, registry: Registered) -> Page[VersionInfo]:
    """Publish the bytes again."""
    return Page[VersionInfo](items=registry.quarantine(version_ref(adapter, version), None))


@router.delete(f"{ADAPTER}/versions/{{version}}", summary="Delete a version", status_code=204, dependencies=PUBLISH)
def delete_version(adapter: AdapterName, version: str, registry: Registered) -> None:
    """Remove a version that nothing depends on; 409 lists what does."""
    registry.delete_version(version_ref(adapter, version))


@router.get(f"{ADAPTER}/versions/{{version}}/signatures", summary="List the signatures of a version")
def signatures(adapter: AdapterName, version: str, registry: Registered) -> Page[SignedBundle]:
    """Each with its bundle: what model.sig beside the files holds."""
    return Page[SignedBundle](items=registry.signatures(version_ref(adapter, version)))


@router.post(
    f"{ADAPTER}/versions/{{version}}/signatures", summary="Attach a signature", status_code=201, dependencies=PUBLISH
)
def add_signature(adapter: AdapterName, version: str, body: SignatureRequest, registry: Registered) -> SignatureInfo:
    """A bundle of model-signing 1.x that lists exactly the files of the version; it is verified where it is used."""
    return registry.add_signature(version_ref(adapter, version), body.bundle)


@router.get(f"{ADAPTER}/bases", summary="List the bases that an adapter fits", tags=["compatibility"])
def bases_for(
    adapter: AdapterName,
    registry: Registered,
    version: VersionQuery = None,
    level: Annotated[Level, Query(description="the weakest level that counts")] = Level.SHAPE,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Page[BaseFit]:
    """Registered bases that fit at `level` or better, best first, then by name."""
    return registry.bases_for(version_ref(adapter, version), level=level, limit=limit, cursor=cursor)


@router.get(f"{ADAPTER}/inspect", summary="Inspect a version")
def inspect(adapter: AdapterName, registry: Registered, version: VersionQuery = None) -> dict[str, Any]:
    """What a version holds, tensor by tensor."""
    return registry.inspect(version_ref(adapter, version))


@router.get(f"{ADAPTER}/files/{{filename:path}}", summary="Download a file of a version", response_class=Response)
def download(
    request: Request, adapter: AdapterName, filename: str, registry: Registered, version: VersionQuery = None
) -> Response:
    """One file; its ETag is the sha256 of its bytes."""
    info = registry.usable_version(version_ref(adapter, version))
    entry = next((file for file in info.files if file.name == filename), None)
    if entry is None:
        raise NotFoundError(
            f"{info.name}@{info.version} has no file {filename!r}",
            expected=[file.name for file in info.files],
            found=filename,
        )
    path = registry.version_files(f"{info.name}@{info.digest}")[filename]
    count_download(request, registry, info, filename)
    return file_response(request, path, filename, entry.sha256)

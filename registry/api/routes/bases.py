"""Base models: upload, list, and the adapters that fit one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from composer.checkpoint import open_checkpoint
from composer.errors import UsageError
from registry.access import Scope
from registry.api.deps import DEFAULT_LIMIT, Cursor, Jobs, Limit, Registered, require
from registry.api.rules import refuse_path
from registry.api.schemas import form_body
from registry.api.uploads import Upload, receive
from registry.schemas import BaseInfo, CompatibleAdapter, JobInfo, Level, LineageInfo, Page, Relation

router = APIRouter(tags=["bases"])

UPLOAD = form_body(
    (),
    name="the base's name; default: made from the upload",
    parent="the base it was made from",
    relation="finetune, quantized, merged or resized",
    license="an SPDX expression; default: the one of README.md",
)


@router.post(
    "/bases",
    summary="Upload a base model",
    status_code=201,
    openapi_extra=UPLOAD,
    dependencies=[Depends(require(Scope.PUBLISH, everywhere=True))],
)
async def add_base(
    request: Request,
    response: Response,
    registry: Registered,
    jobs: Jobs,
    background: Annotated[bool, Query(description="answer at once with the job that fingerprints it")] = False,
) -> BaseInfo | JobInfo:
    """Fingerprint and register a checkpoint. 200 when the same weights are registered already, 202 for a job."""
    upload = await receive(request)
    if background:
        job = await run_in_threadpool(_queue, upload, jobs)
        response.status_code = 202
        response.headers["Location"] = f"/api/v1/jobs/{job.id}"
        return job
    base = await run_in_threadpool(_register, upload, registry)
    response.status_code = 201 if base.created else 200
    return base


def _fields(upload: Upload) -> dict[str, Any]:
    """Name, parent, relation and licence of an upload, whose folder takes the name."""
    upload.only("name", "parent", "relation", "license")
    name, parent, relation = upload.text("name"), upload.text("parent"), upload.text("relation")
    if relation is not None and relation not in list(Relation):
        raise UsageError(f"unknown relation {relation!r}", expected=list(Relation), found=relation)
    upload.rename(name)
    parent = None if parent is None else refuse_path(parent, "the parent")
    return {"name": name, "parent": parent, "relation": None if relation is None else Relation(relation),
            "license": upload.text("license")}  # fmt: skip


def _queue(upload: Upload, jobs: Jobs) -> JobInfo:
    with upload:
        fields = _fields(upload)
        open_checkpoint(upload.folder)  # what is no checkpoint is refused at once
        upload.settle()
        job = jobs.submit_base(upload.folder, **fields)
        upload.keep()
        return job


def _register(upload: Upload, registry: Registered) -> BaseInfo:
    with upload:
        fields = _fields(upload)
        upload.settle()
        base: BaseInfo = registry.add_base(upload.folder, **fields)
        if base.created or Path(base.location) == upload.folder.resolve():
            upload.keep()  # a base is registered by reference: its files stay where they are
    return base


@router.get("/bases", summary="List base models")
def list_bases(registry: Registered, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Page[BaseInfo]:
    """Registered bases by name."""
    return registry.list_bases(limit=limit, cursor=cursor)


@router.get("/bases/{name:path}/adapters", summary="List the adapters that fit a base")
def compatible(
    name: str,
    registry: Registered,
    level: Annotated[Level, Query(description="the weakest level that counts")] = Level.SHAPE,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Page[CompatibleAdapter]:
    """Latest versions that fit the base at `level` or better, best first, then the newest."""
    return registry.compatible(refuse_path(name, "the base"), level=level, limit=limit, cursor=cursor)


@router.get("/bases/{name:path}/lineage", summary="Show the line of a base model")
def lineage(name: str, registry: Registered) -> LineageInfo:
    """Ancestors and descendants, with what the weights say of each edge; and bases that the weights suggest."""
    return registry.lineage(refuse_path(name, "the base"))


@router.post(
    "/bases/{name:path}/verifications",
    summary="Verify a base model",
    status_code=202,
    dependencies=[Depends(require(Scope.COMPOSE))],
)
def verify(name: str, response: Response, jobs: Jobs) -> JobInfo:
    """Queue a job that hashes every tensor again; Location names it."""
    job = jobs.submit_verify(refuse_path(name, "the base"))
    response.headers["Location"] = f"/api/v1/jobs/{job.id}"
    return job


@router.delete(
    "/bases/{name:path}",
    summary="Remove a base model",
    status_code=204,
    dependencies=[Depends(require(Scope.ADMIN, everywhere=True))],
)
def remove(name: str, registry: Registered) -> None:
    """Forget a base that nothing needs; 409 lists what does."""
    registry.remove_base(refuse_path(name, "the base"))


@router.get("/bases/{name:path}/inspect", summary="Inspect a base model")
def inspect(name: str, registry: Registered) -> dict[str, Any]:
    """What the base holds, tensor by tensor."""
    return registry.inspect(registry.get_base(refuse_path(name, "the base")).fingerprint)


@router.get("/bases/{name:path}", summary="Show a base model")
def get_base(name: str, registry: Registered) -> BaseInfo:
    """One base by name or by fingerprint (``wf1:…``)."""
    return registry.get_base(refuse_path(name, "the base"))

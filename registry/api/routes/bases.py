"""Base models: upload, list, and the adapters that fit one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from composer.errors import UsageError
from registry.api.deps import DEFAULT_LIMIT, Cursor, Limit, Registered
from registry.api.rules import refuse_path
from registry.api.schemas import form_body
from registry.api.uploads import Upload, receive
from registry.schemas import BaseInfo, CompatibleAdapter, Level, Page, Relation

router = APIRouter(tags=["bases"])

UPLOAD = form_body(
    (),
    name="the base's name; default: made from the upload",
    parent="the base it was made from",
    relation="finetune, quantized, merged or resized",
)


@router.post("/bases", summary="Upload a base model", status_code=201, openapi_extra=UPLOAD)
async def add_base(request: Request, response: Response, registry: Registered) -> BaseInfo:
    """Fingerprint and register a checkpoint. 200 when the same weights are registered already."""
    upload = await receive(request)
    base = await run_in_threadpool(_register, upload, registry)
    response.status_code = 201 if base.created else 200
    return base


def _register(upload: Upload, registry: Registered) -> BaseInfo:
    with upload:
        upload.only("name", "parent", "relation")
        name, parent, relation = upload.text("name"), upload.text("parent"), upload.text("relation")
        if relation is not None and relation not in list(Relation):
            raise UsageError(f"unknown relation {relation!r}", expected=list(Relation), found=relation)
        upload.rename(name)
        base: BaseInfo = registry.add_base(
            upload.folder,
            name=name,
            parent=None if parent is None else refuse_path(parent, "the parent"),
            relation=None if relation is None else Relation(relation),
        )
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
) -> Page[CompatibleAdapter]:
    """Latest versions that fit the base at `level` or better, best first."""
    return Page[CompatibleAdapter](items=registry.compatible(refuse_path(name, "the base"), level=level))


@router.get("/bases/{name:path}/inspect", summary="Inspect a base model")
def inspect(name: str, registry: Registered) -> dict[str, Any]:
    """What the base holds, tensor by tensor."""
    return registry.inspect(registry.get_base(refuse_path(name, "the base")).fingerprint)


@router.get("/bases/{name:path}", summary="Show a base model")
def get_base(name: str, registry: Registered) -> BaseInfo:
    """One base by name or by fingerprint (``wf1:…``)."""
    return registry.get_base(refuse_path(name, "the base"))

"""Large files by Git LFS, for clients without Xet and for streams.

POST  /{id}.git/info/lfs/objects/batch   where to put each object, unless it is here
PUT   /lfs/{sha256}?size=…&sender=…&expires=…&signature=…    in one piece, of any size up to --max-upload
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import Field

from composer.errors import CorruptFileError
from registry.access import Scope
from registry.api.deps import Registered, require
from registry.api.hub.errors import HubRoute
from registry.api.hub.requests import SHA256, RepositoryId, Sent
from registry.api.rules import MAX_FILES
from registry.api.uploads import feed_body, too_large

router = APIRouter(route_class=HubRoute, include_in_schema=False)


class LargeObject(Sent):
    """An object that a client is about to send."""

    oid: str = Field(pattern=SHA256)
    size: int = Field(ge=0)


class Batch(Sent):
    """The objects of a push."""

    operation: Literal["upload"]
    objects: list[LargeObject] = Field(max_length=MAX_FILES)


@router.post("/{repository:repository}.git/info/lfs/objects/batch", dependencies=[Depends(require(Scope.PUBLISH))])
def batch(request: Request, repository: RepositoryId, body: Batch, registry: Registered) -> Response:
    """A signed URL an object; none for one that is here and that the caller has sent or may read."""
    registry.repositories.snapshot(repository)
    limit: int = request.app.state.max_upload_bytes
    sender = registry.received.sender()
    answers: list[dict[str, Any]] = []
    for item in body.objects:
        answer: dict[str, Any] = {"oid": item.oid, "size": item.size}
        if item.size > limit:
            answer["error"] = {"code": 413, "message": too_large(limit, item.size).message}
        elif not (registry.received.may_name(item.oid) and registry.store.keep_whole(item.oid)):
            signed = request.app.state.signer.query("lfs", item.oid, item.size, sender)
            href = f"{request.base_url}lfs/{item.oid}?size={item.size}&sender={quote(sender, safe='')}&{signed}"
            answer["actions"] = {"upload": {"href": href, "header": {}}}
        answers.append(answer)
    content = {"transfer": "basic", "objects": answers}
    return JSONResponse(content, media_type="application/vnd.git-lfs+json")


@router.put("/lfs/{oid}")
async def put(
    request: Request,
    oid: Annotated[str, Path(pattern=SHA256)],
    size: Annotated[int, Query(ge=0)],
    expires: int,
    signature: str,
    sender: str = "",
) -> Response:
    """The bytes of one object; its signed URL is the permission, for a client sends no token along."""
    request.app.state.signer.check(expires, signature, "lfs", oid, size, sender)
    registry = request.app.state.registry
    async with contextmanager_in_threadpool(registry.store.receive(oid)) as writer:
        received = await feed_body(request, writer.write, size)
        if received != size:
            raise CorruptFileError("the object is cut short", expected=size, found=received, remedy="push again")
    await run_in_threadpool(registry.received.note, sender, oid)
    return Response()

"""Large files by Xet, which clients use by themselves wherever it is installed.

GET   /api/models/{id}/xet-write-token/{rev}   a token, and this CAS
POST  /xet/v1/xorbs/default/{hash}
POST  /xet/v1/shards                           the files that the xorbs make

Downloads need none of it: every file is a plain blob.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool
from starlette.concurrency import run_in_threadpool

from registry.access import Scope
from registry.api.deps import Registered, require
from registry.api.hub.errors import HubRoute
from registry.api.hub.requests import MODEL, RepositoryId, Revision
from registry.api.uploads import feed_body

if TYPE_CHECKING:
    from registry.store.xorbs import XorbStore

router = APIRouter(route_class=HubRoute, include_in_schema=False)


@router.get(f"{MODEL}/xet-write-token/{{revision}}", dependencies=[Depends(require(Scope.PUBLISH))])
def write_token(
    request: Request, response: Response, repository: RepositoryId, revision: Revision, registry: Registered
) -> dict[str, Any]:
    """A token for uploads, and where they go."""
    registry.repositories.snapshot(repository, revision)
    token, expires = request.app.state.signer.token("xet", sender := registry.received.sender())
    token = f"{token}.{urlsafe_b64encode(sender.encode()).decode()}"
    url = f"{request.base_url}xet"
    response.headers["X-Xet-Cas-Url"] = url
    response.headers["X-Xet-Access-Token"] = token
    response.headers["X-Xet-Token-Expiration"] = str(expires)
    return {"accessToken": token, "exp": expires, "casUrl": url}


async def _sender(request: Request) -> str:
    """Who was given the token of the request, which must be one of ours; see Received.sender."""
    token, _, encoded = request.headers.get("authorization", "").removeprefix("Bearer ").rpartition(".")
    try:
        sender = urlsafe_b64decode(encoded).decode()
    except ValueError:
        sender = ""
    request.app.state.signer.check_token(token, "xet", sender)
    return sender


Sender = Annotated[str, Depends(_sender)]


def _xorbs(request: Request) -> XorbStore:
    from registry.store.xorbs import XorbStore

    return XorbStore(request.app.state.registry.layout)


@router.post("/xet/v1/xorbs/{prefix}/{name}")
async def put_xorb(request: Request, prefix: str, name: str, sender: Sender) -> dict[str, bool]:
    """Chunks, kept when they have the hash that they are sent under."""
    from registry.store.xorbs import MAX_XORB

    async with contextmanager_in_threadpool(_xorbs(request).receive(name)) as file:
        await feed_body(request, file.write, MAX_XORB)
    await run_in_threadpool(request.app.state.registry.received.note, sender, name)
    return {"was_inserted": True}


@router.post("/xet/v1/shards")
async def put_shard(request: Request, sender: Sender) -> dict[str, int]:
    """Files as ranges of xorbs that their sender sent: each becomes a blob, checked by its sha256."""
    from registry.store.shards import MAX_SHARD

    shard = bytearray()
    await feed_body(request, shard.extend, MAX_SHARD)
    await run_in_threadpool(_take, request, bytes(shard), sender)
    return {"result": 1}


def _take(request: Request, shard: bytes, sender: str) -> None:
    from registry.store.shards import assemble, read_shard, release
    from registry.store.xorbs import missing_xorb

    registry, limit, xorbs = request.app.state.registry, request.app.state.max_upload_bytes, _xorbs(request)
    files = read_shard(shard)
    for file in files:
        for name in sorted({segment.xorb for segment in file.segments}):
            if not registry.received.sent(sender, name):
                raise missing_xorb(name)
        if not (registry.received.sent(sender, file.sha256) and registry.store.keep_whole(file.sha256)):
            assemble(file, xorbs, registry.store, limit)
        registry.received.note(sender, file.sha256)
    release(files, xorbs)

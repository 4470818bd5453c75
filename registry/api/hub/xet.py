"""Large files by Xet, which clients use by themselves wherever it is installed.

GET   /api/models/{id}/xet-write-token/{rev}   a token, and this CAS
POST  /xet/v1/xorbs/default/{hash}
POST  /xet/v1/shards                           the files that the xorbs make

Downloads need none of it: every file is a plain blob.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool
from starlette.concurrency import run_in_threadpool

from registry.access import Scope
from registry.api.deps import Registered, require
from registry.api.hub.errors import HubRoute
from registry.api.hub.requests import MODEL, RepositoryId, Revision
from registry.api.uploads import feed_body

router = APIRouter(route_class=HubRoute, include_in_schema=False)


@router.get(f"{MODEL}/xet-write-token/{{revision}}", dependencies=[Depends(require(Scope.PUBLISH))])
def write_token(
    request: Request, response: Response, repository: RepositoryId, revision: Revision, registry: Registered
) -> dict[str, Any]:
    """A token for uploads, and where they go."""
    registry.repositories.snapshot(repository, revision)
    token, expires = request.app.state.signer.token("xet")
    url = f"{request.base_url}xet"
    response.headers["X-Xet-Cas-Url"] = url
    response.headers["X-Xet-Access-Token"] = token
    response.headers["X-Xet-Token-Expiration"] = str(expires)
    return {"accessToken": token, "exp": expires, "casUrl": url}


async def _signed(request: Request) -> None:
    """The request has a token of ours."""
    request.app.state.signer.check_token(request.headers.get("authorization", "").removeprefix("Bearer "), "xet")


async def _xorbs(registry: Registered) -> Any:
    from registry.store.xorbs import XorbStore

    return XorbStore(registry.layout)


Xorbs = Annotated[Any, Depends(_xorbs)]


@router.post("/xet/v1/xorbs/{prefix}/{name}", dependencies=[Depends(_signed)])
async def put_xorb(request: Request, prefix: str, name: str, xorbs: Xorbs) -> dict[str, bool]:
    """Chunks, kept when they have the hash that they are sent under."""
    from registry.store.xorbs import MAX_XORB

    async with contextmanager_in_threadpool(xorbs.receive(name)) as file:
        await feed_body(request, file.write, MAX_XORB)
    return {"was_inserted": True}


@router.post("/xet/v1/shards", dependencies=[Depends(_signed)])
async def put_shard(request: Request, registry: Registered, xorbs: Xorbs) -> dict[str, int]:
    """Files as ranges of xorbs: each becomes a blob, checked by its sha256."""
    from registry.store.shards import MAX_SHARD, assemble, keep_shard, read_shard

    shard = bytearray()
    await feed_body(request, shard.extend, MAX_SHARD)
    limit: int = request.app.state.max_upload_bytes
    for file in await run_in_threadpool(read_shard, bytes(shard)):
        await run_in_threadpool(assemble, file, xorbs, registry.store, limit)
        await run_in_threadpool(keep_shard, registry.layout, file)
    return {"result": 1}

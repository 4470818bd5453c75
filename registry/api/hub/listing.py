"""``GET /api/models``: what is here, by tag, author and words.

filter=base_model:adapter:X   filter=base_hash:wf1:…   filter=kind:lora   any tag of a card; all of them must fit
sort=createdAt|lastModified|downloads    the newest, the last changed, the most downloaded first; else by name
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from composer.errors import UsageError
from registry.access import Scope
from registry.api.deps import Registered, require
from registry.api.hub.errors import HubRoute
from registry.api.hub.shapes import model, tags_of
from registry.schemas import BaseInfo, VersionInfo
from registry.services.listing import Listing, Order
from registry.services.listing import Query as Wanted

router = APIRouter(route_class=HubRoute, dependencies=[Depends(require(Scope.READ))], include_in_schema=False)

PAGE = 500
ORDERS = {
    "createdAt": Order.CREATED,
    "lastModified": Order.CHANGED,
    "downloads": Order.DOWNLOADS,
    "trendingScore": Order.NAME,  # nothing here has any, so all are equal and the name decides
    "likes": Order.NAME,
}
UNDERSTOOD = frozenset(
    {"filter", "author", "search", "sort", "direction", "limit", "cursor", "full", "cardData", "config", "expand"}
)


@router.get("/api/models")
def list_models(
    request: Request,
    response: Response,
    registry: Registered,
    tags: Annotated[list[str] | None, Query(alias="filter")] = None,
    author: str | None = None,
    search: str | None = None,
    sort: str | None = None,
    direction: str | None = None,
    limit: Annotated[int, Query(ge=1)] = PAGE,
    cursor: str | None = None,
) -> list[dict[str, Any]]:
    """A page of repositories; the header Link leads to the next."""
    if sort is not None and sort not in ORDERS:
        raise UsageError(f"no order by {sort!r}", expected=list(ORDERS), found=sort, remedy="leave the order out")
    if direction not in (None, "-1"):
        raise UsageError("orders go down only", expected="-1", found=direction, remedy="leave the direction out")
    if unknown := sorted(set(request.query_params) - UNDERSTOOD):
        raise UsageError(f"no filter by {unknown[0]!r}", expected=sorted(UNDERSTOOD), found=unknown, remedy="use a tag")
    wanted = tuple(part for tag in tags or () for part in tag.split(",") if part)
    query = Wanted(wanted, author, search, ORDERS.get(sort or "", Order.NAME))
    found, following = Listing(registry.engine, tags_of).page(query, min(limit, PAGE), cursor)
    if following is not None:
        url = request.url.include_query_params(cursor=following)
        response.headers["Link"] = f'<{url}>; rel="next"'
    return [_listed(item.noun, item.downloads) for item in found]


def _listed(noun: VersionInfo | BaseInfo, downloads: int) -> dict[str, Any]:
    adapter = noun if isinstance(noun, VersionInfo) else None
    commit, private = (adapter.digest[7:47], adapter.private) if adapter else (None, False)
    return model(noun.name, commit, noun.created_at, noun, private=private, downloads=downloads)

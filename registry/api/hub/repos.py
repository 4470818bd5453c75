"""Repositories, branches and tags.

POST         /api/repos/create   /api/repos/move        PUT /api/models/{id}/settings
DELETE       /api/repos/delete
POST DELETE  /api/models/{id}/branch/{branch}   /api/models/{id}/tag/{revision or tag}
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from composer.errors import PolicyError
from registry.access import Principal, Scope
from registry.api.deps import Registered, require
from registry.api.hub.errors import HubRoute, hub_error
from registry.api.hub.requests import MODEL, RepositoryId, Revision, Sent, namespace_of
from registry.errors import RepositoryExistsError

Publisher = Annotated[Principal, Depends(require(Scope.PUBLISH))]

router = APIRouter(route_class=HubRoute, dependencies=[Depends(require(Scope.PUBLISH))], include_in_schema=False)


class Repository(Sent):
    """A repository to create or to delete, or its settings."""

    name: str = ""
    organization: str | None = None
    type: str | None = None
    visibility: str | None = None
    private: bool | None = None
    gated: bool | str | None = None

    def named(self, caller: Principal) -> str:
        """``namespace/name``."""
        return self.name if "/" in self.name else f"{self.organization or namespace_of(caller)}/{self.name}"

    def check(self) -> None:
        """Raise PolicyError for what is asked for and not offered."""
        if (self.type or "model") != "model":
            _refuse("model", str(self.type))
        if self.visibility not in (None, "public", "private"):
            _refuse("public or private", self.visibility)
        if self.gated:
            _refuse("private", "gated")

    @property
    def hidden(self) -> bool | None:
        """Whether it is to be private, None where nothing is said of that."""
        return self.visibility == "private" if self.visibility else self.private


def _refuse(wanted: str, found: str) -> None:
    raise PolicyError(
        f"a {found} repository is not offered here", expected=wanted, found=found, remedy=f"make it a {wanted} one"
    )


class Move(Sent):
    """A repository's names, before and after."""

    source: str = Field(alias="fromRepo")
    target: str = Field(alias="toRepo")
    type: str | None = None


class Start(Sent):
    """Where a branch begins."""

    starting_point: str | None = Field(default=None, alias="startingPoint")


class Tag(Sent):
    """A tag's name; its message is not kept."""

    tag: str


@router.post("/api/repos/create")
def create(
    request: Request,
    body: Repository,
    registry: Registered,
    caller: Publisher,
) -> Response:
    """An empty repository. One that is there is a conflict whose answer has its URL all the same."""
    body.check()
    name = body.named(caller)
    url = f"{str(request.base_url).rstrip('/')}/{name}"
    try:
        registry.repository_admin.create(name, private=bool(body.hidden))
    except RepositoryExistsError as error:
        refused = hub_error(error)
        content = {"error": error.message, "url": url, "name": name}
        return JSONResponse(content, refused.status_code, {"X-Error-Message": refused.headers["X-Error-Message"]})
    return JSONResponse({"url": url, "name": name})


@router.delete("/api/repos/delete")
def delete(body: Repository, registry: Registered, caller: Publisher) -> dict[str, Any]:
    """Remove a repository that nothing needs."""
    registry.repository_admin.delete(body.named(caller))
    return {}


@router.post("/api/repos/move")
def move(body: Move, registry: Registered) -> dict[str, Any]:
    """Rename a repository."""
    registry.repository_admin.move(body.source, body.target)
    return {}


@router.put(f"{MODEL}/settings")
def settings(repository: RepositoryId, body: Repository, registry: Registered) -> dict[str, Any]:
    """Public or private; gated is not offered."""
    body.check()
    if body.hidden is not None:
        registry.repository_admin.set_private(repository, body.hidden)
    return {"private": registry.repositories.snapshot(repository).private, "gated": False}


@router.post(f"{MODEL}/branch/{{branch:path}}")
def create_branch(repository: RepositoryId, branch: str, body: Start, registry: Registered) -> dict[str, Any]:
    """A branch at a revision."""
    registry.repository_admin.create_branch(repository, branch, body.starting_point)
    return {}


@router.delete(f"{MODEL}/branch/{{branch:path}}")
def delete_branch(repository: RepositoryId, branch: str, registry: Registered) -> dict[str, Any]:
    """Remove a branch."""
    registry.repository_admin.delete_branch(repository, branch)
    return {}


@router.post(f"{MODEL}/tag/{{revision}}")
def create_tag(repository: RepositoryId, revision: Revision, body: Tag, registry: Registered) -> dict[str, Any]:
    """A tag at a revision: on an adapter a version or an alias."""
    registry.repository_admin.create_tag(repository, body.tag, revision)
    return {}


@router.delete(f"{MODEL}/tag/{{tag:path}}")
def delete_tag(repository: RepositoryId, tag: str, registry: Registered) -> dict[str, Any]:
    """Remove a tag."""
    registry.repository_admin.delete_tag(repository, tag)
    return {}

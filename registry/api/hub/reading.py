"""What clients read: repositories, trees, files, revisions, and who they are.

GET       /api/models/{id}   …/revision/{rev}   …/tree/{rev}[/{path}]   …/commits/{rev}   …/refs
POST      /api/models/{id}/paths-info/{rev}
HEAD GET  /{id}/resolve/{rev}/{path}
GET       /api/whoami-v2   /api/models/{id}/auth-check
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request, Response

from registry.access import Principal, Scope
from registry.api.deps import Registered, count_download, file_response, require
from registry.api.hub.errors import HubRoute
from registry.api.hub.requests import MODEL, RepositoryId, Revision, namespace_of
from registry.api.hub.shapes import LARGE, describe, directory, entry, entry_oid, time
from registry.errors import EntryNotFoundError
from registry.services.repositories import Snapshot

router = APIRouter(route_class=HubRoute, dependencies=[Depends(require(Scope.READ))], include_in_schema=False)


@router.get("/api/whoami-v2")
def whoami(caller: Annotated[Principal, Depends(require(Scope.READ))]) -> dict[str, Any]:
    """The caller, as clients expect a user."""
    token = {"displayName": namespace_of(caller), "role": "write" if caller.may(Scope.PUBLISH) else "read"}
    return {
        "type": "user",
        "id": namespace_of(caller),
        "name": namespace_of(caller),
        "fullname": namespace_of(caller),
        "orgs": [],
        "auth": {"type": "access_token", "accessToken": token},
    }


@router.get(f"{MODEL}/revision/{{revision}}")
def model_at(repository: RepositoryId, revision: Revision, registry: Registered) -> dict[str, Any]:
    """Its commit, files, tags and card."""
    return describe(registry.repositories, registry.repositories.snapshot(repository, revision))


@router.get(f"{MODEL}/tree/{{revision}}")
@router.get(f"{MODEL}/tree/{{revision}}/{{path:path}}")
def tree(
    repository: RepositoryId, revision: Revision, registry: Registered, path: str = "", recursive: bool = False
) -> list[dict[str, Any]]:
    """Files and folders, by name."""
    snapshot = registry.repositories.snapshot(repository, revision)
    found = _listing(snapshot, path.strip("/"), recursive=recursive)
    if path and not found:
        raise EntryNotFoundError(
            f"{repository} has no folder {path!r}",
            expected=sorted(snapshot.files)[:20],
            found=path,
            commit=snapshot.commit,
        )
    return [
        entry(registry.repositories, snapshot, snapshot.files[name]) if name in snapshot.files else directory(name)
        for name in found
    ]


def _listing(snapshot: Snapshot, folder: str, *, recursive: bool) -> list[str]:
    prefix = f"{folder}/" if folder else ""
    found: set[str] = set()
    for name in snapshot.files:
        if name.startswith(prefix):
            parts = name.removeprefix(prefix).split("/")
            depths = range(1, len(parts) + 1) if recursive else (1,)
            found.update(prefix + "/".join(parts[:depth]) for depth in depths)
    return sorted(found)


@router.post(f"{MODEL}/paths-info/{{revision}}")
def paths_info(
    repository: RepositoryId, revision: Revision, registry: Registered, paths: Annotated[list[str], Form()]
) -> list[dict[str, Any]]:
    """Those of the paths that are there."""
    snapshot = registry.repositories.snapshot(repository, revision)
    everything = set(_listing(snapshot, "", recursive=True))
    return [
        entry(registry.repositories, snapshot, snapshot.files[path]) if path in snapshot.files else directory(path)
        for path in dict.fromkeys(paths)
        if path in everything
    ]


@router.get(f"{MODEL}/commits/{{revision}}")
def commits(repository: RepositoryId, revision: Revision, registry: Registered) -> list[dict[str, Any]]:
    """The commit of a revision and those before it."""
    return [
        {"id": item.oid, "title": item.title, "message": item.message, "authors": [], "date": time(item.created_at)}
        for item in registry.repositories.history(repository, revision)
    ]


@router.get(f"{MODEL}/refs")
def refs(repository: RepositoryId, registry: Registered) -> dict[str, Any]:
    """Versions and aliases are tags."""
    found = registry.repositories.refs(repository)
    return {
        "branches": [_ref("heads", name, oid) for name, oid in found.branches.items()],
        "tags": [_ref("tags", name, oid) for name, oid in found.tags.items()],
        "converts": [],
        "pullRequests": [],
    }


def _ref(kind: str, name: str, oid: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}


@router.get(f"{MODEL}/auth-check")
def auth_check(repository: RepositoryId, registry: Registered) -> dict[str, Any]:
    """An answer without content where the caller may."""
    registry.repositories.snapshot(repository)
    return {}


@router.get(MODEL)
def model(repository: RepositoryId, registry: Registered) -> dict[str, Any]:
    """Its main branch: commit, files, tags and card."""
    return describe(registry.repositories, registry.repositories.snapshot(repository))


@router.api_route(
    "/{repository:repository}/resolve/{revision}/{path:path}",
    methods=["GET", "HEAD"],
    response_class=Response,
)
def resolve(
    request: Request, repository: RepositoryId, revision: Revision, path: str, registry: Registered
) -> Response:
    """One file, whole or a range of it; X-Repo-Commit names the commit that the revision stands for."""
    snapshot = registry.repositories.snapshot(repository, revision)
    place = registry.repositories.path(snapshot, path)
    file = snapshot.files[path]
    oid = entry_oid(registry.repositories, snapshot, file)
    if snapshot.version and request.method == "GET":
        count_download(request, registry, snapshot.version, path)
    headers = {"X-Repo-Commit": snapshot.commit}
    if file.size >= LARGE:
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{oid}"'}
    return file_response(request, place, path, file.sha256, oid=oid, more=headers)

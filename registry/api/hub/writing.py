"""What clients write: commits.

POST  /api/models/{id}/preupload/{rev}   which files come inside the commit, which before it, which not at all
POST  /api/models/{id}/commit/{rev}      ndjson: header, file (base64), lfsFile, deletedFile, deletedFolder
POST  /api/validate-yaml

A commit is read line by line: no more than one small file of it is in memory.
"""

from __future__ import annotations

import base64
import binascii
from http import HTTPStatus
from typing import Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import Field, TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from composer.admission import refuse_unsafe
from composer.errors import CorruptFileError, UsageError
from composer.sinks import storage_errors
from registry.access import Scope
from registry.api.deps import Registered, require
from registry.api.hub.errors import HubRoute, header_text
from registry.api.hub.requests import MODEL, SHA256, RepositoryId, Revision, Sent
from registry.api.hub.shapes import LARGE, entry_oid
from registry.api.rules import MAX_FILES, UploadTooLargeError, check_file_name
from registry.api.uploads import feed_body, too_large
from registry.claims import split_card
from registry.pushes import is_ignored
from registry.services.pushing import Operation, Put, Remove
from registry.store.local import LocalStore

router = APIRouter(route_class=HubRoute, dependencies=[Depends(require(Scope.PUBLISH))], include_in_schema=False)

MAX_LINE = LARGE * 4 // 3 + (64 << 10)


class PreuploadFile(Sent):
    """A file that a client is about to push."""

    path: str
    size: int = Field(ge=0)


class Preupload(Sent):
    """The files of a push."""

    files: list[PreuploadFile] = Field(max_length=MAX_FILES)


class Header(Sent):
    """The first line of a commit."""

    summary: str = ""
    description: str | None = None
    parent_commit: str | None = Field(default=None, alias="parentCommit")


class File(Sent):
    """A small file, inside the commit."""

    path: str
    content: str
    encoding: Literal["base64", "utf-8"] = "utf-8"


class LargeFile(Sent):
    """A file whose bytes were uploaded before."""

    path: str
    oid: str = Field(pattern=SHA256)
    algo: Literal["sha256"] = "sha256"


class Deleted(Sent):
    """What is to be removed."""

    path: str


class Line(Sent):
    """One line of a commit."""

    key: Literal["header", "file", "lfsFile", "deletedFile", "deletedFolder"]
    value: dict[str, Any]


LINE = TypeAdapter(Line)


@router.post("/api/validate-yaml")
def validate_yaml(body: dict[str, Any]) -> dict[str, Any]:
    """Whether the front matter of a card can be read."""
    try:
        split_card(str(body.get("content", "")))
    except CorruptFileError as error:
        return {"errors": [{"message": f"{error.message}: {error.found}"}], "warnings": []}
    return {"errors": [], "warnings": []}


@router.post(f"{MODEL}/preupload/{{revision}}")
def preupload(
    request: Request, repository: RepositoryId, revision: Revision, body: Preupload, registry: Registered
) -> dict[str, Any]:
    """How each file is to be sent. Files that may not be here or are too large are refused before they are."""
    snapshot = registry.repositories.snapshot(repository, revision)
    limit: int = request.app.state.max_upload_bytes
    answers = []
    for file in body.files:
        ignored = is_ignored(file.path)
        if not ignored:
            _check_path(file.path)
        if file.size > limit and not ignored:
            raise too_large(limit, file.size)
        there = snapshot.files.get(file.path)
        answers.append(
            {
                "path": file.path,
                "uploadMode": "lfs" if file.size >= LARGE else "regular",
                "shouldIgnore": ignored,
                "oid": entry_oid(registry.repositories, snapshot, there) if there else None,
            }
        )
    return {"files": answers}


@router.post(f"{MODEL}/commit/{{revision}}")
async def commit(
    request: Request,
    response: Response,
    repository: RepositoryId,
    revision: Revision,
    registry: Registered,
    create_pr: bool = Query(default=False),
) -> dict[str, Any]:
    """Apply the operations to a branch. What is refused leaves the branch as it was."""
    if create_pr:
        raise UsageError(
            "there are no pull requests here",
            expected="a push to a branch",
            found="create_pr",
            remedy="create a branch and push to it; tag it with a version to publish",
        )
    reader = CommitReader(registry.store)
    await feed_body(request, reader.feed, request.app.state.max_upload_bytes)
    await run_in_threadpool(reader.finish)
    header = reader.header or Header()
    pushed = await run_in_threadpool(
        registry.pushing.commit,
        repository,
        revision,
        reader.operations,
        title=header.summary or "push",
        message=header.description or "",
        parent=header.parent_commit,
    )
    for number, warning in enumerate(pushed.warnings):
        response.headers.append("X-HF-Warning", f"push-{number}; {header_text(warning)}")
    response.status_code = HTTPStatus.OK
    url = f"{str(request.base_url).rstrip('/')}/{repository}/commit/{pushed.commit}"
    return {"success": True, "commitOid": pushed.commit, "commitUrl": url, "hookOutput": ""}


class CommitReader:
    """Takes the body of a commit piece by piece; small files go to the store as their line ends."""

    def __init__(self, store: LocalStore) -> None:
        self.header: Header | None = None
        self.operations: list[Operation] = []
        self._store = store
        self._line = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        first, *rest = chunk.split(b"\n")
        self._line += first
        for piece in rest:
            self._take(bytes(self._line))
            self._line = bytearray(piece)
        if len(self._line) > MAX_LINE:
            raise UploadTooLargeError(
                "a line of the commit is too long",
                expected=f"at most {MAX_LINE} bytes: larger files are uploaded before the commit",
                found=f"{len(self._line)} bytes or more",
                remedy="update huggingface_hub",
            )

    def finish(self) -> None:
        """Take the last line, which need not end."""
        self._take(bytes(self._line))

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            item = LINE.validate_json(line)
            self._apply(item.key, item.value)
        except (ValidationError, binascii.Error) as error:
            raise UsageError(
                f"a line of the commit cannot be read: {error}", found=line[:200].decode("utf-8", "replace")
            ) from None
        if len(self.operations) > MAX_FILES:
            raise UploadTooLargeError("too many operations", expected=f"at most {MAX_FILES}", remedy="push in parts")

    def _apply(self, key: str, value: dict[str, Any]) -> None:
        if key == "header":
            self.header = Header.model_validate(value)
        elif key == "file":
            file = File.model_validate(value)
            if not is_ignored(file.path):
                data = base64.b64decode(file.content) if file.encoding == "base64" else file.content.encode()
                self.operations.append(Put(_check_path(file.path), self._keep(file.path, data), sent=True))
        elif key == "lfsFile":
            large = LargeFile.model_validate(value)
            self.operations.append(Put(_check_path(large.path), large.oid))
        else:
            self.operations.append(Remove(Deleted.model_validate(value).path, folder=key == "deletedFolder"))

    def _keep(self, path: str, data: bytes) -> str:
        with storage_errors(f"storing {path}"), self._store.receive() as writer:
            writer.write(data)
        return writer.sha256


def _check_path(path: str) -> str:
    """`path`, if a file may be called so here. Raises UsageError, or UnsafeFormatError for what is never kept."""
    refuse_unsafe([path])
    return check_file_name(path)

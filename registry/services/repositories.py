"""Adapters, bases and pushed drafts as repositories: what lies at a revision, and what revisions there are.

    repository   namespace/name of an adapter or a base, or one that was created and pushed to
    commit       40 hex digits of the digest of its files: the same files are the same commit
    revision     main, another branch, a tag (version or alias), a commit, sha256:… or wf1:…

`main` is the newest of what was pushed to it and of the latest version: publishing moves it, however it is done.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from composer.errors import UsageError
from composer.provenance import manifest_digest
from registry.db import session_scope
from registry.errors import (
    EntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    VersionNotFoundError,
)
from registry.lifecycle import require_usable
from registry.models import AdapterRow, AliasRow, BaseModelRow, CommitRow, RefRow, RepositoryRow, VersionRow
from registry.names import Version, adapter_name
from registry.schemas import BaseInfo, FileInfo, VersionInfo
from registry.services.base_files import unchanged_files
from registry.services.catalogue import LATEST, base_info, find_version, version_info
from registry.services.lifecycle import refuse_tainted
from registry.store.chunks import damaged
from registry.store.local import LocalStore

__all__ = [
    "MAIN",
    "CommitInfo",
    "Located",
    "Refs",
    "Repositories",
    "Snapshot",
    "commit_id",
    "locate",
    "no_revision",
    "snapshot_at",
]

MAIN = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_HISTORY = 1000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a repository holds at one revision; a draft has neither `version` nor `base`.

    private: whether only members of its namespace see it. downloads: of all versions.
    """

    repository: str
    commit: str
    files: Mapping[str, FileInfo]
    created_at: datetime | None = None
    version: VersionInfo | None = None
    base: BaseInfo | None = None
    private: bool = False
    downloads: int = 0


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """One commit of a history."""

    oid: str
    title: str
    message: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Refs:
    """Names to commits."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Located:
    """The rows behind a repository's name: at least one is there, and never an adapter and a base together."""

    name: str
    repository: RepositoryRow | None
    adapter: AdapterRow | None
    base: BaseModelRow | None

    @property
    def private(self) -> bool:
        """Whether only members of its namespace see it."""
        return self.adapter.private if self.adapter else bool(self.repository and self.repository.private)


def commit_id(files: Iterable[FileInfo]) -> str:
    """The 40 hex digits that name these files: of an adapter's version, the first of its digest."""
    return manifest_digest({file.name: {"sha256": file.sha256} for file in files})[7:47]


def locate(session: Session, name: str) -> Located:
    """What `name` names. A name without namespace is a base or an adapter of the default one.

    Raises RepositoryNotFoundError.
    """
    try:
        namespace, short = adapter_name(name)
    except UsageError:
        raise _no_repository(name) from None
    base = session.scalar(select(BaseModelRow).where(BaseModelRow.name == name))
    adapter = session.scalar(select(AdapterRow).where(AdapterRow.namespace == namespace, AdapterRow.name == short))
    if base is not None and "/" not in name:
        namespace, adapter = "", None
    repository = session.scalar(
        select(RepositoryRow).where(RepositoryRow.namespace == namespace, RepositoryRow.name == short)
    )
    if base is None and adapter is None and repository is None:
        raise _no_repository(name)
    return Located(name if base else f"{namespace}/{short}", repository, adapter, base)


def _no_repository(name: str) -> RepositoryNotFoundError:
    return RepositoryNotFoundError(
        f"no repository is named {name!r}",
        expected="an adapter, a base or a created repository",
        found=name,
        remedy="see 'registry list' and 'registry base list', or create it",
    )


def snapshot_at(session: Session, place: Located, revision: str | None) -> Snapshot:
    """The files of a repository at a revision. Raises RevisionNotFoundError or VersionNotFoundError."""
    found = _snapshot_at(session, place, revision or MAIN)
    return replace(found, private=place.private, downloads=place.adapter.downloads if place.adapter else 0)


def _snapshot_at(session: Session, place: Located, revision: str) -> Snapshot:
    if revision == MAIN:
        return _head(session, place)
    if place.repository and (row := _ref(session, place.repository, revision)):
        return _of_commit(session, place, row.commit)
    if COMMIT.fullmatch(revision) and (found := _by_commit(session, place, revision)):
        return found
    if place.base and revision == place.base.fingerprint:
        return _of_base(session, place, place.base)
    if place.adapter:
        wanted = revision[1:] if revision.startswith("v") and Version.matches(revision[1:]) else revision
        for text in dict.fromkeys((revision, wanted)):
            try:
                row = find_version(session, place.adapter.full_name, text)
            except VersionNotFoundError:
                continue
            return _of_version(session, place, row, text)
    raise no_revision(place, revision)


def no_revision(place: Located, revision: str) -> RevisionNotFoundError:
    """The failure of a revision that is not there."""
    return RevisionNotFoundError(
        f"{place.name} has no revision {revision!r}",
        expected="main, a branch, a version, an alias, a commit or a digest",
        found=revision,
        remedy=f"see 'registry versions {place.name}'" if place.adapter else "push it first",
    )


def _head(session: Session, place: Located) -> Snapshot:
    ref = _ref(session, place.repository, MAIN) if place.repository else None
    if place.adapter:
        versions = select(VersionRow).where(VersionRow.adapter_id == place.adapter.id, VersionRow.latest)
        latest = session.scalar(versions)
        if latest is not None and (ref is None or latest.created_at > ref.updated_at):
            return _of_version(session, place, latest)
    if ref is not None:
        return _of_commit(session, place, ref.commit)
    if place.base:
        return _of_base(session, place, place.base)
    created = place.repository.created_at if place.repository else None
    return Snapshot(place.name, commit_id(()), {}, created)


def _ref(session: Session, repository: RepositoryRow, name: str) -> RefRow | None:
    rows = select(RefRow).where(RefRow.repository_id == repository.id, RefRow.name == name)
    return session.scalar(rows.order_by(RefRow.kind).limit(1))


def _by_commit(session: Session, place: Located, oid: str) -> Snapshot | None:
    if place.repository:
        row = session.scalar(
            select(CommitRow).where(CommitRow.repository_id == place.repository.id, CommitRow.oid == oid)
        )
        if row is not None:
            return _of_commit(session, place, row)
    if place.adapter:
        same = VersionRow.digest.startswith(f"sha256:{oid}")
        version = session.scalar(
            select(VersionRow).where(VersionRow.adapter_id == place.adapter.id, same).order_by(*LATEST).limit(1)
        )
        return _of_version(session, place, version, version.digest) if version else None
    if place.base and (found := _of_base(session, place, place.base)).commit == oid:
        return found
    return None


def _of_commit(session: Session, place: Located, row: CommitRow) -> Snapshot:
    version = session.get(VersionRow, row.version_id) if row.version_id else None
    base = session.get(BaseModelRow, row.base_id) if row.base_id else None
    if base:
        refuse_tainted(session, base)
    if version:
        require_usable(version, f"{place.name}@{version.version}", version.digest)
    return Snapshot(
        place.name,
        row.oid,
        {file.path: FileInfo(name=file.path, size=file.size, sha256=file.sha256) for file in row.files},
        row.created_at,
        version_info(session, version) if version else None,
        base_info(base, len(base.tensors)) if base else None,
    )


def _of_version(session: Session, place: Located, row: VersionRow, asked: str | None = None) -> Snapshot:
    """A version, unless it is quarantined, or yanked and not asked for by its digest."""
    require_usable(row, f"{place.name}@{row.version}", asked)
    info = version_info(session, row)
    return Snapshot(place.name, info.digest[7:47], {f.name: f for f in info.files}, row.created_at, version=info)


def _of_base(session: Session, place: Located, row: BaseModelRow) -> Snapshot:
    refuse_tainted(session, row)
    files = [FileInfo(name=file.name, size=file.size, sha256=file.sha256) for file in row.files]
    info = base_info(row, len(row.tensors))
    return Snapshot(place.name, commit_id(files), {f.name: f for f in files}, row.created_at, base=info)


class Repositories:
    """Reads."""

    def __init__(self, engine: Engine, store: LocalStore) -> None:
        self._engine = engine
        self._store = store

    def snapshot(self, name: str, revision: str | None = None) -> Snapshot:
        """What a repository holds. Raises RepositoryNotFoundError or RevisionNotFoundError."""
        with session_scope(self._engine) as session:
            return snapshot_at(session, locate(session, name), revision)

    def path(self, snapshot: Snapshot, name: str) -> Path:
        """The file of an entry: its blob, or the file of a base that was registered where it lies.

        Raises EntryNotFoundError, BlobCorruptError, or BaseChangedError when a base's file is not what was registered.
        """
        entry = snapshot.files.get(name)
        if entry is None:
            raise EntryNotFoundError(
                f"{snapshot.repository} has no file {name!r} at {snapshot.commit[:12]}",
                expected=sorted(snapshot.files)[:20],
                found=name,
                commit=snapshot.commit,
            )
        if snapshot.base is None or self._store.holds(entry.sha256):
            return self._store.path(entry.sha256)
        with session_scope(self._engine) as session:
            row = session.scalar(select(BaseModelRow).where(BaseModelRow.fingerprint == snapshot.base.fingerprint))
            if row is None:
                raise _no_repository(snapshot.repository)
            return unchanged_files(row, [file for file in row.files if file.name == name])[name]

    def read(self, snapshot: Snapshot, name: str) -> bytes:
        """A small file of an entry, whole. Raises what `path` raises, and BlobCorruptError."""
        path, sha256 = self.path(snapshot, name), snapshot.files[name].sha256
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise damaged(path, f"sha256 {sha256}", "others")
        return data

    def history(self, name: str, revision: str | None = None) -> tuple[CommitInfo, ...]:
        """The commit at a revision and those before it, newest first."""
        with session_scope(self._engine) as session:
            place = locate(session, name)
            start = snapshot_at(session, place, revision)
            found: dict[str, CommitInfo] = {}
            pushed = _pushed(session, place)
            oid: str | None = start.commit
            while oid and oid in pushed and oid not in found and len(found) < MAX_HISTORY:
                row = pushed[oid]
                found[oid] = CommitInfo(oid, row.title, row.message, row.created_at)
                oid = row.parent
            for commit in _published(session, place):
                if start.created_at and commit.created_at <= start.created_at:
                    found.setdefault(commit.oid, commit)
            if not found and start.created_at and start.files:
                found[start.commit] = CommitInfo(start.commit, "registered", "", start.created_at)
        return tuple(sorted(found.values(), key=lambda commit: commit.created_at, reverse=True))

    def refs(self, name: str) -> Refs:
        """Branches and tags. Versions and aliases of an adapter are its tags."""
        with session_scope(self._engine) as session:
            place = locate(session, name)
            found: dict[str, dict[str, str]] = {"branch": {MAIN: _head(session, place).commit}, "tag": {}}
            if place.repository:
                for row in session.scalars(select(RefRow).where(RefRow.repository_id == place.repository.id)):
                    found[row.kind].setdefault(row.name, row.commit.oid)
            if place.adapter:
                versions = select(VersionRow).where(VersionRow.adapter_id == place.adapter.id)
                for version in session.scalars(versions.order_by(VersionRow.sort_key)):
                    found["tag"][version.version] = version.digest[7:47]
                for alias in session.scalars(select(AliasRow).where(AliasRow.adapter_id == place.adapter.id)):
                    found["tag"][alias.alias] = alias.version.digest[7:47]
        return Refs(found["branch"], found["tag"])


def _pushed(session: Session, place: Located) -> dict[str, CommitRow]:
    if place.repository is None:
        return {}
    rows = select(CommitRow).where(CommitRow.repository_id == place.repository.id)
    return {row.oid: row for row in session.scalars(rows.order_by(CommitRow.id.desc()).limit(MAX_HISTORY))}


def _published(session: Session, place: Located) -> Iterable[CommitInfo]:
    if place.adapter is None:
        return
    rows = select(VersionRow).where(VersionRow.adapter_id == place.adapter.id)
    for row in session.scalars(rows.order_by(VersionRow.created_at.desc()).limit(MAX_HISTORY)):
        yield CommitInfo(row.digest[7:47], f"version {row.version}", row.description, row.created_at)

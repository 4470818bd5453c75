"""Pushes: operations on a branch become a commit, and a commit on main that is whole becomes a version or a base.

    commit   the branch's files -> operations -> checked and published -> one transaction that moves the branch

Blobs are in the store before. A push whose files fail the checks is refused and leaves no trace; one that is not whole
yet, or goes to another branch, is kept as a draft.
"""

from __future__ import annotations

import shutil
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from composer.adapters import open_adapter
from composer.admission import refuse_unsafe
from composer.errors import CorruptFileError, NotFoundError, PolicyError, UsageError
from composer.sinks import storage_errors
from registry.access import Role
from registry.claims import read_card
from registry.db import session_scope
from registry.errors import EntryNotFoundError, NameTakenError, StaleParentError
from registry.models import BaseModelRow, CommitFileRow, CommitRow, RefRow, RepositoryRow, VersionRow, now
from registry.names import DEFAULT_NAMESPACE
from registry.pushes import CARD, CONFIG, Holding, base_reference, complete_card, complete_config, holding
from registry.schemas import FileInfo
from registry.services.base_files import link_files
from registry.services.blobs import require_blobs
from registry.services.catalogue import find_version
from registry.services.namespaces import require_role
from registry.services.publishing import Publishing
from registry.services.received import Received
from registry.services.repositories import MAIN, Located, Snapshot, commit_id, locate, no_revision, snapshot_at
from registry.store.layout import Layout
from registry.store.local import LocalStore

__all__ = [
    "Operation",
    "Pushed",
    "Pushing",
    "Put",
    "Remove",
    "keep_commit",
    "namespace_of",
    "own_repository",
    "private_base",
]

MAX_FILES = 10_000


@dataclass(frozen=True, slots=True)
class Put:
    """A file is added or replaced by a blob of the store. `sent`: whether its bytes came with the push itself."""

    path: str
    sha256: str
    sent: bool = False


@dataclass(frozen=True, slots=True)
class Remove:
    """A file, or a folder with all that is in it, is removed."""

    path: str
    folder: bool = False


Operation = Put | Remove


@dataclass(frozen=True, slots=True)
class Pushed:
    """The commit that a push made, or found to be there already."""

    commit: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of the files: those to keep, and the rows that they were published as."""

    files: Mapping[str, FileInfo]
    version: str | None = None
    fingerprint: str | None = None
    warnings: tuple[str, ...] = ()


class Pushing:
    """Writes to repositories, and through them to the catalogue."""

    def __init__(self, engine: Engine, store: LocalStore, layout: Layout, publishing: Publishing) -> None:
        self._engine = engine
        self._store = store
        self._layout = layout
        self._publishing = publishing
        self._received = Received(engine)
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def commit(
        self,
        name: str,
        branch: str,
        operations: Sequence[Operation],
        *,
        title: str,
        message: str = "",
        parent: str | None = None,
    ) -> Pushed:
        """Apply `operations` to a branch. The same files as before are no news.

        parent: the commit that the branch must be at. Raises RepositoryNotFoundError, RevisionNotFoundError,
        EntryNotFoundError (nothing to remove), StaleParentError, PolicyError for a base that was registered from a
        folder, and what publishing raises.
        """
        with self._locks[name]:
            with session_scope(self._engine, writes=True) as session:
                place = locate(session, name)
                require_role(session, namespace_of(place), Role.PUBLISHER, claim=True)
                before = _at_branch(session, place, branch)
            if parent is not None and not before.commit.startswith(parent):
                raise _stale(name, parent, before.commit)
            self._refuse_foreign(before)
            files = self._apply(before, operations)
            if commit_id(files.values()) == before.commit:
                return Pushed(before.commit)
            refuse_unsafe(files)
            outcome = self._publish(place, files) if branch == MAIN else self._draft(files)
            oid = commit_id(outcome.files.values())
            with session_scope(self._engine, writes=True) as session:
                place = locate(session, name)
                found = _at_branch(session, place, branch).commit
                if found not in (before.commit, oid):
                    raise _stale(name, before.commit, found)
                require_blobs(session, self._store, {path: file.sha256 for path, file in outcome.files.items()})
                repository = own_repository(session, place)
                row = keep_commit(session, repository, oid, outcome.files, before.commit, title, message)
                row.version_id, row.base_id = self._nouns(session, name, outcome)
                set_ref(session, repository, "branch", branch, row)
        return Pushed(oid, outcome.warnings)

    def publish_version(self, name: str, snapshot: Snapshot, version: str) -> None:
        """Publish the adapter at a snapshot under a semantic version of one's choice.

        Raises UsageError where it is none, and what publishing raises.
        """
        if holding(self._paths(snapshot.files)) is not Holding.ADAPTER:
            raise UsageError(
                f"{name} holds no adapter at {snapshot.commit[:12]}",
                expected="an adapter",
                found="a base" if snapshot.base else "a draft",
                remedy="push all of the adapter's files first",
            )
        self._publish_adapter(name, snapshot.files, version)

    def _refuse_foreign(self, before: Snapshot) -> None:
        lacking = [file.name for file in before.files.values() if not self._store.holds(file.sha256)]
        if lacking:
            raise PolicyError(
                f"{before.repository} is a base that was registered from a folder of the service's machine",
                expected="a repository that was pushed",
                found=lacking[0],
                remedy="push to another name",
            )

    def _apply(self, before: Snapshot, operations: Sequence[Operation]) -> dict[str, FileInfo]:
        files = dict(before.files)
        for item in operations:
            if isinstance(item, Put):
                files[item.path] = self._entry(item)
                continue
            gone = [path for path in files if path == item.path and not item.folder]
            gone += [path for path in files if item.folder and path.startswith(item.path.rstrip("/") + "/")]
            if not gone:
                raise EntryNotFoundError(
                    f"A file with this name doesn't exist: {item.path}",  # a client looks for these words
                    expected=sorted(files)[:20],
                    found=item.path,
                    commit=before.commit,
                )
            for path in gone:
                del files[path]
        clash = next((path for path in files for above in Path(path).parents if above.as_posix() in files), None)
        if clash or len(files) > MAX_FILES:
            raise UsageError(
                f"{clash} lies under a file" if clash else f"{len(files)} files",
                expected="folders above files" if clash else f"at most {MAX_FILES} files",
                found=clash or len(files),
                remedy="remove the file first" if clash else "push fewer files",
            )
        return files

    def _entry(self, item: Put) -> FileInfo:
        named = item.sent or self._received.may_name(item.sha256)
        if not (named and self._store.keep(item.sha256)):
            raise CorruptFileError(
                f"the bytes of {item.path} were not uploaded",
                expected=f"sha256 {item.sha256}",
                found="no such upload",
                remedy="push again",
            )
        size = self._store.path(item.sha256).stat().st_size
        return FileInfo(name=item.path, size=size, sha256=item.sha256)

    def _paths(self, files: Mapping[str, FileInfo], *, verify: bool = False) -> dict[str, Path]:
        return {path: self._store.path(file.sha256, verify=verify) for path, file in files.items()}

    def _publish(self, place: Located, files: Mapping[str, FileInfo]) -> _Outcome:
        paths = self._paths(files, verify=True)
        read_card(paths.get(CARD))  # a card that does not parse is refused, whatever it lies beside
        kind = holding(paths)
        if kind is Holding.ADAPTER and place.base is None:
            return self._publish_adapter(place.name, files, None)
        if kind is Holding.BASE and place.adapter is None:
            if place.private:
                raise private_base(place.name)
            folder = link_files(self._layout, paths)
            try:
                base = self._publishing.add_pushed_base(folder, place.name)
            except BaseException:
                shutil.rmtree(folder.parent, ignore_errors=True)
                raise
            if Path(base.location) != folder:
                shutil.rmtree(folder.parent, ignore_errors=True)
            return _Outcome(files, fingerprint=base.fingerprint)
        if kind is not Holding.DRAFT:
            held = "a base model" if place.base else "an adapter"
            raise NameTakenError(
                f"{place.name} is {held}, and these files make {kind.value}",
                expected=held,
                found=kind.value,
                remedy="push it to a repository of its own",
            )
        published = place.adapter or place.base
        why = "kept as a draft: the files do not make an adapter or a whole model yet"
        return _Outcome(files, warnings=(why,) if published or len(files) > 1 else ())

    def _draft(self, files: Mapping[str, FileInfo]) -> _Outcome:
        """What is kept on a branch other than main: what a tag would publish."""
        paths = self._paths(files)
        read_card(paths.get(CARD))
        return _Outcome(self._complete(files)[0] if holding(paths) is Holding.ADAPTER else files)

    def _publish_adapter(self, name: str, files: Mapping[str, FileInfo], version: str | None) -> _Outcome:
        files, fingerprint = self._complete(files)
        result = self._publishing.publish(
            self._paths(files), name, version, fingerprint, None, (), None, None, None, read_paths=False, whole=True
        )
        return _Outcome(files, version=result.version.version, warnings=result.warnings)

    def _complete(self, files: Mapping[str, FileInfo]) -> tuple[Mapping[str, FileInfo], str | None]:
        """The files with the name of a base that is known here in place of its trainer's, and its fingerprint."""
        paths = self._paths(files)
        adapter = open_adapter(paths)
        fingerprint = read_card(paths.get(CARD)).fingerprint or self._referenced(base_reference(adapter.config))
        with session_scope(self._engine) as session:
            row = session.scalar(select(BaseModelRow).where(BaseModelRow.fingerprint == fingerprint))
        if row is None or CONFIG not in files:
            return files, fingerprint
        former = {str(adapter.config.get("base_model_name_or_path") or row.name)}
        changed = {CONFIG: complete_config(paths[CONFIG].read_bytes(), row.name)}
        if CARD in files:
            changed[CARD] = complete_card(paths[CARD].read_bytes(), row.name, row.fingerprint, former)
        kept = dict(files)
        for path, data in changed.items():
            with storage_errors(f"storing {path}"), self._store.receive() as writer:
                writer.write(data)
            kept[path] = FileInfo(name=path, size=writer.size, sha256=writer.sha256)
        return kept, row.fingerprint

    def _referenced(self, reference: tuple[str, str | None] | None) -> str | None:
        """The fingerprint of the base that lies in a repository of this registry."""
        if reference is None:
            return None
        name, revision = reference
        with session_scope(self._engine) as session:
            try:
                base = snapshot_at(session, locate(session, name), revision).base
            except NotFoundError:
                return None
        return base.fingerprint if base else None

    @staticmethod
    def _nouns(session: Session, name: str, outcome: _Outcome) -> tuple[int | None, int | None]:
        version: VersionRow | None = find_version(session, name, outcome.version) if outcome.version else None
        base = session.scalar(select(BaseModelRow.id).where(BaseModelRow.fingerprint == outcome.fingerprint))
        return version.id if version else None, base


def _at_branch(session: Session, place: Located, branch: str) -> Snapshot:
    """The head of a branch. Raises RevisionNotFoundError for what is none."""
    if branch != MAIN and (place.repository is None or not _is_branch(session, place.repository, branch)):
        raise no_revision(place, branch)
    return snapshot_at(session, place, branch)


def _is_branch(session: Session, repository: RepositoryRow, name: str) -> bool:
    return session.get(RefRow, (repository.id, "branch", name)) is not None


def _stale(name: str, expected: str, found: str) -> StaleParentError:
    return StaleParentError(
        f"{name}: a commit has happened since",
        expected=expected,
        found=found,
        remedy="refresh and push again",
    )


def namespace_of(place: Located) -> str:
    """The namespace whose members may change a repository; of a base without one, the default, which is an admin's."""
    return place.name.rpartition("/")[0] or DEFAULT_NAMESPACE


def private_base(name: str) -> PolicyError:
    """The failure of a whole model in a private repository: a fingerprint names one base for everybody."""
    return PolicyError(
        f"{name} would be a private base model: only adapters can be private",
        expected="an adapter, or a public repository",
        found="a whole model",
        remedy="make the repository public, or push the difference to its base ('registry delta make')",
    )


def own_repository(session: Session, place: Located) -> RepositoryRow:
    """The row of a repository, made where an adapter or a base had none."""
    if place.repository is not None:
        return place.repository
    namespace, _, name = place.name.rpartition("/")
    row = RepositoryRow(namespace=namespace, name=name, private=place.private)
    session.add(row)
    session.flush()
    return row


def keep_commit(
    session: Session,
    repository: RepositoryRow,
    oid: str,
    files: Mapping[str, FileInfo],
    parent: str | None,
    title: str,
    message: str = "",
) -> CommitRow:
    """The row of a commit, made where there is none."""
    row = session.scalar(select(CommitRow).where(CommitRow.repository_id == repository.id, CommitRow.oid == oid))
    if row is None:
        rows = [CommitFileRow(path=path, size=file.size, sha256=file.sha256) for path, file in files.items()]
        row = CommitRow(
            repository_id=repository.id, oid=oid, parent=parent, title=title[:500], message=message, files=rows
        )
        session.add(row)
        session.flush()
    return row


def set_ref(session: Session, repository: RepositoryRow, kind: str, name: str, commit: CommitRow) -> None:
    """Create or move a branch or a tag."""
    ref = session.get(RefRow, (repository.id, kind, name))
    if ref is None:
        session.add(RefRow(repository_id=repository.id, kind=kind, name=name, commit_id=commit.id))
    else:
        ref.commit_id, ref.updated_at = commit.id, now()

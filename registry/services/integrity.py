"""`registry verify --all` and `registry doctor --repair`: every stored byte is hashed, what is damaged is restored.

    blob          by its sha256            from another copy
    base          by its row's sha256      from another copy; it is written where the base lies
    composition   by the job's record      from another copy, else composed again: the same recipe gives the same bytes
    xorb          by its hash              dropped, or what says where its chunks lie: a client sends it again
    graph, list   by their own checksums   dropped: they are made again; a list at once, for the first reader does so
    entry         digest and fingerprint   no: what the catalogue says of a version's files and of a base
    database      SQLite's own check       no

A copy is any stored file of the same sha256, and it is hashed before it is taken for one. A restored file appears by a
rename, so that a reader meets the damaged one or the whole one.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import select, text

from composer.errors import TypedError
from composer.provenance import manifest_digest, record_file
from composer.recipe import Recipe
from composer.sinks import fsync_folder, storage_errors
from composer.tensors import read_header
from registry.access import Scope
from registry.db import session_scope
from registry.errors import BlobCorruptError
from registry.fingerprint import identity
from registry.interface import Progress
from registry.models import AdapterRow, BaseFileRow, BaseModelRow, JobRow, VersionFileRow, VersionRow
from registry.schemas import Damage, JobState, StoreCheck
from registry.services.audit import acting, record
from registry.services.job_kinds import WITH_FILES
from registry.store.chunks import CHUNK
from registry.store.xorbs import XorbStore

if TYPE_CHECKING:
    from registry.services.local import LocalRegistry

__all__ = ["check_store"]

RECORD = "composition.json"
SHOWN = 20
REMADE = "dropped: it is made again when it is needed"
RESENT = "dropped: a client sends it again once its Xet cache is removed (HF_XET_CACHE)"
REMEDIES = {
    "blob": "publish the version again from its source: its bytes take the place of the damaged ones",
    "base": "restore the file from where it came, or give 'registry base add' a whole copy of the base",
    "composition": "submit the job again",
    "entry": "restore the database from a backup",
    "database": "restore it from a backup, or save what can be read with sqlite3's .recover",
}


@dataclass(frozen=True, slots=True)
class _Item:
    """One stored file: what it is, how it is called, where it lies, and what its bytes must be."""

    kind: str
    name: str
    path: Path
    expected: str
    used_by: tuple[str, ...] = ()
    mtime_ns: int | None = None


@dataclass(slots=True)
class _Run:
    """One pass over a registry."""

    registry: LocalRegistry
    progress: Progress | None
    items: list[_Item] = field(default_factory=list)
    done: int = 0
    total: int = 0

    def advance(self, count: int) -> None:
        """Report `count` more bytes."""
        self.done += count
        if self.progress:
            self.progress("verifying", self.done, self.total)


def check_store(registry: LocalRegistry, *, repair: bool = False, progress: Progress | None = None) -> StoreCheck:
    """Hash everything that is stored; with `repair`, restore what is damaged. For an admin.

    Raises ForbiddenError and, where the disk fails, StorageError.
    """
    with session_scope(registry.engine) as session:
        acting(session).require_everywhere(Scope.ADMIN)
    run = _Run(registry, progress)
    run.items = list(_items(registry))
    run.total = sum(_size(item.path) for item in run.items)
    found = [(item, damage) for item in run.items if (damage := _damage(run, item)) is not None]
    damaged = [*_database(registry), *_entries(registry)]
    damaged += [_repaired(run, item, damage) if repair else damage for item, damage in found]
    if repair and damaged:
        restored = {f"{item.kind} {item.name}": item.restored for item in damaged}
        with session_scope(registry.engine, writes=True) as session:
            record(session, "repair", str(registry.home), files=restored)
    return StoreCheck(files=len(run.items), nbytes=run.total, damaged=tuple(damaged))


def _database(registry: LocalRegistry) -> Iterator[Damage]:
    """What SQLite finds wrong in its own file; PostgreSQL checks its pages as it reads them, if it was told to."""
    if registry.engine.dialect.name != "sqlite":
        return
    path = str(registry.engine.url.database)
    with session_scope(registry.engine) as session:
        for (found,) in session.execute(text(f"PRAGMA integrity_check({SHOWN})")).tuples():
            if found != "ok":
                wrong = {"expected": "ok", "found": str(found), "remedy": REMEDIES["database"]}
                yield Damage(kind="database", name=Path(path).name, path=path, **wrong)


def _entries(registry: LocalRegistry) -> Iterator[Damage]:
    """Versions whose files do not give their digest, and bases whose digests do not give their fingerprint."""
    names = (AdapterRow.namespace, AdapterRow.name, VersionRow.version, VersionRow.digest)
    files = select(*names, VersionFileRow.name, VersionFileRow.sha256).join(VersionRow.adapter)
    files = files.outerjoin(VersionRow.files).order_by(VersionRow.id).execution_options(yield_per=10_000)
    with session_scope(registry.engine) as session:
        for key, rows in itertools.groupby(session.execute(files).tuples(), key=lambda row: tuple(row[:4])):
            held = {name: {"sha256": sha256} for *_, name, sha256 in rows if name is not None}
            yield from _entry("{}/{}@{}".format(*key[:3]), key[3], manifest_digest(held))
        bases = select(
            BaseModelRow.name, BaseModelRow.fingerprint, BaseModelRow.tensor_root, BaseModelRow.config_digest
        )
        for name, fingerprint, root, config in session.execute(bases).tuples():
            yield from _entry(name, fingerprint, identity(root, config))


def _entry(name: str, expected: str, found: str) -> Iterator[Damage]:
    if found != expected:
        yield Damage(
            kind="entry", name=name, path="", expected=expected, found=found, used_by=(name,), remedy=REMEDIES["entry"]
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _items(registry: LocalRegistry) -> Iterator[_Item]:
    """Everything that is stored; lists first, because a reader makes a damaged one anew."""
    layout = registry.layout
    for path in sorted(layout.chunks.glob("??/*")):
        yield _Item("list", path.name, path, path.name)
    users: dict[str, list[str]] = {}
    with session_scope(registry.engine) as session:
        names = (AdapterRow.namespace, AdapterRow.name, VersionRow.version)
        rows = select(VersionFileRow.sha256, *names, VersionFileRow.name)
        rows = rows.join(VersionRow, VersionRow.id == VersionFileRow.version_id).join(AdapterRow)
        for sha256, namespace, name, version, file in session.execute(rows):
            users.setdefault(sha256, []).append(f"{namespace}/{name}@{version}: {file}")
        bases = session.execute(select(BaseModelRow.name, BaseModelRow.location, BaseFileRow).join(BaseFileRow)).all()
        done = (JobRow.state == JobState.SUCCEEDED.value, JobRow.kind.in_(WITH_FILES))
        jobs = session.execute(select(JobRow.id, JobRow.result).where(*done)).all()
    for sha256 in sorted(users.keys() | {path.name for path in layout.blobs.glob("??/*")}):
        yield _Item("blob", sha256, layout.blob(sha256), sha256, tuple(users.get(sha256, ())))
    for name, location, row in bases:
        yield _Item("base", f"{name}/{row.name}", Path(location) / row.name, row.sha256, (name,), row.mtime_ns)
    for job, result in jobs:
        folder = layout.compositions / job
        for name, sha256 in _recorded(result or {}).items() if folder.is_dir() else ():
            yield _Item("composition", f"{job}/{name}", folder / name, sha256, (f"job {job}",))
    for path in sorted(layout.xorbs.glob("??/*")):
        yield _Item("xorb", path.stem, path, path.stem)
    for path in sorted(layout.graphs.glob("*.onnx")):
        yield _Item("graph", path.stem, path, path.stem)


def _recorded(result: dict[str, object]) -> dict[str, str]:
    """The files of a job's output, by the digests in its result."""
    written, files = result.get("record"), result.get("files")
    if isinstance(written, dict) and "outputs" in written:
        own = hashlib.sha256(record_file(written)).hexdigest()
        return {**{name: entry["sha256"] for name, entry in written["outputs"].items()}, RECORD: own}
    return {entry["name"]: entry["sha256"] for entry in files} if isinstance(files, list) else {}


def _damage(run: _Run, item: _Item) -> Damage | None:
    """What is wrong with a file; None where nothing is."""
    ranges: list[tuple[int, int]] = []
    if not item.path.is_file():
        found = "a missing file"
    elif item.kind in ("xorb", "graph", "list"):
        run.advance(_size(item.path))
        if _is_whole(run.registry, item):
            return None
        found = "other bytes"
        if item.kind == "list":
            item.path.unlink()
            dropped = {"found": found, "restored": REMADE, "expected": item.expected}
            return Damage(kind=item.kind, name=item.name, path=str(item.path), **dropped)
    else:
        try:
            reader = run.registry.store.chunks.reader(item.path, item.expected)
            if not (ranges := reader.damaged_ranges(run.advance)):
                return None
            found = ", ".join(f"other bytes in {start}-{stop - 1}" for start, stop in ranges[:SHOWN])
        except BlobCorruptError as error:
            found = str(error.found)
    return Damage(
        kind=item.kind,
        name=item.name,
        path=str(item.path),
        expected=item.expected,
        found=found,
        used_by=item.used_by[:SHOWN],
        tensors=tuple(_tensors_in(item.path, ranges)),
        remedy=REMEDIES.get(item.kind),
    )


def _is_whole(registry: LocalRegistry, item: _Item) -> bool:
    if item.kind == "list":
        return registry.store.chunks.is_whole(item.name)
    if item.kind == "graph":
        from composer.exporters.onnx import graph_cache

        return graph_cache.is_whole(item.path)
    return XorbStore(registry.layout).is_whole(item.name)


def _tensors_in(path: Path, ranges: Iterable[tuple[int, int]]) -> list[str]:
    """Tensors of a safetensors file that lie in damaged chunks; none where its header is damaged too."""
    try:
        header = read_header(path)
    except TypedError:
        return []
    spans = [(spec.name, spec.offset, spec.offset + spec.nbytes) for spec in header.tensors.values()]
    return [name for name, begin, end in spans if any(start < end and begin < stop for start, stop in ranges)][:SHOWN]


def _repaired(run: _Run, item: _Item, damage: Damage) -> Damage:
    """What was done about a damage: `restored` says from what, or is empty where nothing could be."""
    if item.kind == "list":
        return damage
    if item.kind in ("graph", "xorb"):
        item.path.unlink()
        return damage.model_copy(update={"restored": REMADE if item.kind == "graph" else RESENT})
    restored = _from_copy(run, item)
    if restored is None and item.kind == "composition" and _composed_again(run, item):
        restored = "its recipe, composed again to the same bytes"
    return damage.model_copy(update={"restored": restored, "remedy": None if restored else damage.remedy})


def _from_copy(run: _Run, item: _Item) -> str | None:
    """Restore a file from another of the same sha256, or a job's record from the database; says which."""
    if item.kind == "composition" and item.path.name == RECORD:
        job = item.name.partition("/")[0]
        with session_scope(run.registry.engine) as session:
            row = session.get(JobRow, job)
            data = record_file(row.result["record"]) if row and row.result else b""
        return "the database" if _replace(item, [data]) else None
    for other in run.items:
        if other.expected != item.expected or other.kind in ("xorb", "graph", "list") or other.path == item.path:
            continue
        if other.path.is_file() and _replace(item, _pieces(other.path)):
            return f"{other.kind} {other.name}"
    return None


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            yield data


def _replace(item: _Item, pieces: Iterable[bytes]) -> bool:
    """Put bytes in the place of a damaged file, if they are those that belong there."""
    with storage_errors(f"restoring {item.path.name}"):
        item.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=item.path.parent, prefix=f".{item.path.name[:80]}.", suffix=".part")
        aside, digest = Path(name), hashlib.sha256()
        try:
            with os.fdopen(handle, "wb") as file:
                for data in pieces:
                    digest.update(data)
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() != item.expected:
                return False
            aside.chmod(0o444 if item.kind == "blob" else 0o644)
            if item.mtime_ns is not None:  # as it was registered, so that it is not hashed at every use
                os.utime(aside, ns=(item.mtime_ns, item.mtime_ns))
            os.replace(aside, item.path)
            fsync_folder(item.path.parent)
            return True
        finally:
            aside.unlink(missing_ok=True)


def _composed_again(run: _Run, item: _Item) -> bool:
    """Compose a job's recipe once more, and take the file if it is the same."""
    registry, (job, _, name) = run.registry, item.name.partition("/")
    with session_scope(registry.engine) as session:
        row = session.get(JobRow, job)
        if row is None or row.kind != "compose":
            return False
        recipe, pins = Recipe.model_validate(row.request["recipe"]), row.request["pins"]
    scratch = Path(tempfile.mkdtemp(dir=registry.layout.compositions, prefix=f".{job}."))
    try:
        registry.compose(
            recipe, scratch / "again", progress=run.progress, accept_licences=True, pins=tuple(pins) if pins else None
        )
        return _replace(item, _pieces(scratch / "again" / name))
    except TypedError:  # what it is made of is gone or damaged
        return False
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

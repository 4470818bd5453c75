"""`registry gc`: removes what nothing names any more, once it is old enough that nothing can be about to name it.

    stored files that no version names      after the grace period
    half-written files, uploads, imports    after the grace period
    where chunks lay, and who sent them     after the grace period, once the bytes are gone
    jobs that ended, and their outputs      after `keep_jobs`
    records of compositions                 only where `keep_records` is given: they guard what they were made of

Publishing stores a file first and names it in a row second, and touches a file that is there already: the grace period
is for the time between. Should it be too short, nothing is lost either: see registry.services.blobs.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Engine, delete, func, select

from composer.errors import UsageError
from composer.sinks import storage_errors
from registry.access import Scope
from registry.db import refresh_statistics, session_scope
from registry.models import BaseFileRow, BaseModelRow, CompositionRow, JobRow, now
from registry.schemas import Collected, JobState
from registry.services.audit import acting, record
from registry.services.blobs import exclude_naming, named_blobs
from registry.services.received import forget_received
from registry.store.layout import Layout

__all__ = ["Collection"]

BATCH = 200  # files that are removed in one transaction: others wait for it
ACTIVE = (JobState.QUEUED.value, JobState.RUNNING.value)


class Collection:
    """Looks for what may go, and removes it."""

    def __init__(self, engine: Engine, layout: Layout) -> None:
        self._engine = engine
        self._layout = layout

    def collect(
        self, grace: timedelta, keep_jobs: timedelta, keep_records: timedelta | None, dry_run: bool
    ) -> Collected:
        """Remove, or with `dry_run` only count. For an admin."""
        if min(grace, keep_jobs, keep_records or grace) < timedelta(0):
            raise UsageError("a time to keep cannot be negative", expected="0 days or more")
        with session_scope(self._engine) as session:
            acting(session).require_everywhere(Scope.ADMIN)
        jobs, records = self._rows(keep_jobs, keep_records, dry_run)
        before = time.time() - grace.total_seconds()
        with storage_errors("collecting what nothing names"):
            counts = {
                "blobs": self._blobs(before, dry_run),
                "uploads": self._folders(self._unused_uploads(before), dry_run),
                "compositions": self._folders(self._unused_compositions(before, jobs), dry_run),
            }
            half = self._folders(self._half_written(before), dry_run)
            self._folders(self._notes(before), dry_run)
        if not dry_run:
            self._forget(before)
        result = Collected(
            dry_run=dry_run,
            blobs=counts["blobs"][0],
            uploads=counts["uploads"][0],
            compositions=counts["compositions"][0] + half[0],
            jobs=len(jobs),
            records=records,
            nbytes=sum(size for _, size in counts.values()) + half[1],
        )
        if not dry_run:
            refresh_statistics(self._engine)
            with session_scope(self._engine, writes=True) as session:
                record(session, "gc", str(self._layout.home), **result.model_dump(exclude={"dry_run"}))
        return result

    def _rows(self, keep_jobs: timedelta, keep_records: timedelta | None, dry_run: bool) -> tuple[list[str], int]:
        over = (JobRow.state.not_in(ACTIVE), JobRow.finished_at < now() - keep_jobs)
        with session_scope(self._engine, writes=not dry_run) as session:
            jobs = list(session.scalars(select(JobRow.id).where(*over)))
            old = CompositionRow.created_at < now() - (keep_records or timedelta(0))
            counted = select(func.count()).select_from(CompositionRow).where(old)
            records = session.scalar(counted) or 0 if keep_records is not None else 0
            if not dry_run:
                session.execute(delete(JobRow).where(*over))
                if records:
                    session.execute(delete(CompositionRow).where(old))
        return jobs, records

    def _forget(self, before: float) -> None:
        """What is known of bytes that are gone: where chunks lay in them, and who sent them."""
        from registry.store.xorbs import collect_places

        with storage_errors("collecting what nothing names"):
            collect_places(self._layout, before)
        with session_scope(self._engine, writes=True) as session:
            forget_received(session, self._layout, datetime.fromtimestamp(before, UTC))

    def _blobs(self, before: float, dry_run: bool) -> tuple[int, int]:
        count = nbytes = 0
        old = list(_older(self._layout.blobs, before, "??/*"))
        for start in range(0, len(old), BATCH):
            batch = old[start : start + BATCH]
            with session_scope(self._engine, writes=not dry_run) as session:
                if not dry_run:
                    exclude_naming(session)
                named = named_blobs(session, [path.name for path in batch])
                for path in batch:
                    size = None if path.name in named else _remove_older(path, before, dry_run)
                    count, nbytes = (count, nbytes) if size is None else (count + 1, nbytes + size)
        return count, nbytes

    def _notes(self, before: float) -> Iterator[Path]:
        """What is known of files that are neither blobs nor a base's any more: it is small, and made again."""
        with session_scope(self._engine) as session:
            of_bases = set(session.scalars(select(BaseFileRow.sha256)))
        for path in _older(self._layout.chunks, before, "??/*"):
            if path.name not in of_bases and not self._layout.blob(path.name).is_file():
                yield path

    def _half_written(self, before: float) -> Iterator[Path]:
        yield from _older(self._layout.incoming, before)
        yield from _older(self._layout.graphs, before, ".*.tmp")
        for folder in self._layout.imports.glob("*"):  # one that goes on has a young file, whatever the folder says
            if not any(path.stat().st_mtime >= before for path in (folder, *folder.rglob("*"))):
                yield folder

    def _unused_uploads(self, before: float) -> Iterator[Path]:
        with session_scope(self._engine) as session:
            used = [Path(location) for location in session.scalars(select(BaseModelRow.location))]
            requests = session.scalars(select(JobRow.request).where(JobRow.kind == "base", JobRow.state.in_(ACTIVE)))
            used += [Path(request["folder"]) for request in requests]
        kept = {
            path.relative_to(self._layout.uploads).parts[0] for path in used if self._layout.uploads in path.parents
        }
        return (path for path in _older(self._layout.uploads, before) if path.name not in kept)

    def _unused_compositions(self, before: float, gone: list[str]) -> Iterator[Path]:
        """Outputs of jobs that are gone, and half-written folders that no running job writes."""
        with session_scope(self._engine) as session:
            known = set(session.scalars(select(JobRow.id))) - set(gone)
        for path in self._layout.compositions.glob("*"):
            if path.name in gone or (
                path.name.lstrip(".").partition(".")[0] not in known and path.stat().st_mtime < before
            ):
                yield path

    @staticmethod
    def _folders(paths: Iterator[Path], dry_run: bool) -> tuple[int, int]:
        count = nbytes = 0
        for path in paths:
            count += 1
            files = (item for item in path.rglob("*") if item.is_file()) if path.is_dir() else (path,)
            nbytes += sum(item.stat().st_size for item in files)
            if not dry_run and path.is_dir():
                shutil.rmtree(path)
            elif not dry_run:
                path.unlink()
        return count, nbytes


def _older(folder: Path, before: float, pattern: str = "*") -> Iterator[Path]:
    return (path for path in folder.glob(pattern) if path.stat().st_mtime < before)


def _remove_older(path: Path, before: float, dry_run: bool) -> int | None:
    """Remove a file that was not touched since it was looked at; returns its size, None where it stays."""
    try:
        stat = path.stat()
    except FileNotFoundError:  # another collection was faster
        return None
    if stat.st_mtime >= before:
        return None
    if not dry_run:
        path.unlink()
    return stat.st_size

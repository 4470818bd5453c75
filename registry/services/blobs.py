"""Naming stored files and removing them exclude each other: a row never names bytes that are not there.

    name      in the transaction that names them    all are there -> commit
    remove    in a transaction of its own           nothing names it -> unlink -> commit

Two such transactions never overlap. SQLite has one writer at a time, which is the lock; PostgreSQL has an advisory one,
which those who name share. So it holds whatever a clock says, and wherever either of them is killed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import select, union
from sqlalchemy.orm import Session

from registry.errors import CollectedError
from registry.models import CommitFileRow, VersionFileRow
from registry.store.local import LocalStore

__all__ = ["exclude_naming", "named_blobs", "require_blobs"]

LOCK = 0x626C6F62  # any number that nothing else of this database takes


def require_blobs(session: Session, store: LocalStore, files: Mapping[str, str]) -> None:
    """Keep `files` (name to sha256) from a collection until this transaction ends.

    Raises CollectedError when one is gone already.
    """
    connection = session.connection()  # a session begins with its first use, and SQLite's lock is taken then
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock_shared({LOCK})")
    for name, sha256 in files.items():
        if not store.holds(sha256):
            raise CollectedError(
                f"{name} was collected before anything named it",
                expected=f"the stored file {sha256}",
                found="no such file",
                remedy="send it again; 'registry gc' leaves alone what is younger than its --grace",
            )


def exclude_naming(session: Session) -> None:
    """Let nobody name a blob until this transaction, which must be one that writes, ends."""
    connection = session.connection()
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")


def named_blobs(session: Session, digests: Iterable[str]) -> set[str]:
    """Those of `digests` that a version or a commit names."""
    wanted = list(digests)
    columns = (VersionFileRow.sha256, CommitFileRow.sha256)
    return set(session.scalars(union(*(select(column).where(column.in_(wanted)) for column in columns))))

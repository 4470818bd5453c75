"""Who has sent which bytes, so that a push may name only what its sender has or may see.

A commit names large files by their sha256, and a shard names xorbs by their hash. Whoever knew the digest of a private
file could otherwise have it put into a repository of their own. So the service remembers who sent what, and lets a push
name those bytes and the files of what its sender may read. Whoever may see everything is not asked.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from registry.db import session_scope
from registry.models import (
    BaseFileRow,
    CommitFileRow,
    CommitRow,
    ReceivedRow,
    RepositoryRow,
    VersionFileRow,
    VersionRow,
    now,
)
from registry.services.audit import acting
from registry.store.layout import Layout

__all__ = ["Received", "forget_received"]


class Received:
    """Writes and reads what subjects sent."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def sender(self) -> str:
        """Whom bytes that come now will count for; nobody ("") where the caller may see everything anyway."""
        with session_scope(self._engine) as session:
            principal = acting(session)
        return "" if principal.is_admin else principal.subject

    def note(self, sender: str, digest: str) -> None:
        """`sender` has sent these bytes."""
        if not sender:
            return
        with session_scope(self._engine, writes=True) as session:
            held = session.get(ReceivedRow, (sender, digest), with_for_update=True)
            if held is None:
                session.merge(ReceivedRow(subject=sender, digest=digest))
            else:
                held.created_at = now()

    def sent(self, sender: str, digest: str) -> bool:
        """Whether `sender` has sent these bytes, or need not have."""
        if not sender:
            return True
        with session_scope(self._engine) as session:
            return session.get(ReceivedRow, (sender, digest)) is not None

    def may_name(self, sha256: str) -> bool:
        """Whether the caller has sent this file, or may read it somewhere."""
        with session_scope(self._engine) as session:
            principal = acting(session)
            if principal.is_admin or session.get(ReceivedRow, (principal.subject, sha256)):
                return True
            return _readable(session, sha256)


def _readable(session: Session, sha256: str) -> bool:
    """Whether a version, a commit or a base that the caller may see has the file; visibility narrows the queries."""
    version = select(VersionRow.id).join(VersionFileRow, VersionFileRow.version_id == VersionRow.id)
    commit = select(RepositoryRow.id).join(CommitRow, CommitRow.repository_id == RepositoryRow.id).join(CommitFileRow)
    for query in (
        version.where(VersionFileRow.sha256 == sha256),
        commit.where(CommitFileRow.sha256 == sha256),
        select(BaseFileRow.base_id).where(BaseFileRow.sha256 == sha256),
    ):
        if session.scalar(query.limit(1)) is not None:
            return True
    return False


def forget_received(session: Session, layout: Layout, before: datetime) -> None:
    """Forget who sent what is no longer here."""
    old = select(ReceivedRow.digest).where(ReceivedRow.created_at < before).distinct()
    gone = [
        digest
        for digest in session.scalars(old)
        if not (layout.blob(digest).exists() or any(layout.xorb_files(digest)))
    ]
    for digest in gone:
        session.execute(delete(ReceivedRow).where(ReceivedRow.digest == digest, ReceivedRow.created_at < before))

"""The audit log: who changed what, written in the transaction of the change; nothing changes or removes an entry.

The principal comes with the engine (`execution_options(principal=…)`), so no service can forget to pass it on.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from registry.access import LOCAL, Principal, Scope
from registry.db import session_scope
from registry.models import AuditRow
from registry.schemas import AuditEntry, Page

__all__ = ["AuditLog", "acting", "record"]

MAX_PAGE = 1000


def acting(session: Session) -> Principal:
    """On whose behalf a session works."""
    found: Principal = session.get_bind().get_execution_options().get("principal", LOCAL)
    return found


def record(session: Session, action: str, target: str, **detail: Any) -> None:
    """Add an entry to the transaction."""
    principal = acting(session)
    session.add(AuditRow(action=action, target=target, subject=principal.subject, token=principal.token, detail=detail))


class AuditLog:
    """Reads the log, newest first."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def list(
        self, limit: int, cursor: str | None, *, subject: str | None = None, target: str | None = None
    ) -> Page[AuditEntry]:
        """Entries, newest first; the cursor is the last number seen. Only for an admin."""
        limit = max(1, min(limit, MAX_PAGE))
        query = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit + 1)
        if cursor:
            query = query.where(AuditRow.id < _number(cursor))
        if subject:
            query = query.where(AuditRow.subject == subject)
        if target:
            query = query.where(AuditRow.target == target)
        with session_scope(self._engine) as session:
            acting(session).require_everywhere(Scope.ADMIN)
            rows = list(session.scalars(query))
        items = tuple(
            AuditEntry(id=row.id, at=row.at, subject=row.subject, token=row.token, action=row.action,
                       target=row.target, detail=row.detail)
            for row in rows[:limit]
        )  # fmt: skip
        return Page(items=items, next=str(items[-1].id) if len(rows) > limit else None)

    def denied(self, target: str, code: str) -> None:
        """Note that somebody known was refused."""
        with session_scope(self._engine, writes=True) as session:
            record(session, "denied", target, code=code)


def _number(cursor: str) -> int:
    from composer.errors import UsageError

    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise UsageError(f"{cursor!r} is no cursor of this listing", expected="the `next` of a page", found=cursor)
    return int(cursor)

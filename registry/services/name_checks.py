"""New names against those that exist: refused where a stranger's namespace would be mistaken for another, else told."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.confusables import near, skeleton
from registry.errors import ConfusableNameError
from registry.models import AdapterRow, MemberRow

__all__ = ["name_warnings", "refuse_confusable"]

NEWEST = 10_000  # adapters of a namespace that a new one is compared with


def refuse_confusable(session: Session, namespace: str, subject: str) -> None:
    """Raise ConfusableNameError where a namespace of others has the same skeleton as the new one.

    It is named only where it holds something public, so that private namespaces cannot be sounded out.
    """
    own = set(session.scalars(select(MemberRow.namespace).where(MemberRow.subject == subject)))
    alike = sorted(
        name for name in _namespaces(session) - own if name != namespace and skeleton(name) == skeleton(namespace)
    )
    if alike:
        known = sorted(_public(session) & set(alike))
        raise ConfusableNameError(
            f"the namespace {namespace!r} could be taken for {known[0]!r}" if known
            else f"the namespace {namespace!r} could be taken for another one",
            expected="a namespace that reads differently from those of others",
            found=known or "one that is not public",
            remedy="choose another name, or ask an admin to make you its owner: "
            f"'registry namespace grant {namespace} {subject} owner'",
        )  # fmt: skip


def name_warnings(session: Session, namespace: str, name: str) -> list[str]:
    """What a new adapter's name, and its namespace where that is new too, can be mistaken for."""
    table = AdapterRow.__table__.c
    newest = select(table.name).where(table.namespace == namespace, ~table.private).order_by(table.id.desc())
    siblings = [other for other in session.scalars(newest.limit(NEWEST)) if near(name, other)]
    found = [f"{namespace}/{name} can be taken for {namespace}/{other}" for other in siblings[:3]]
    if not session.scalar(select(func.count()).select_from(AdapterRow).where(AdapterRow.namespace == namespace)):
        alike = sorted(other for other in _public(session) if near(namespace, other))
        found += [f"the new namespace {namespace!r} can be taken for {other!r}" for other in alike[:3]]
    return found


def _namespaces(session: Session) -> set[str]:
    """All that have members or adapters; by the tables, so that private ones count."""
    members = select(MemberRow.__table__.c.namespace)
    return set(session.scalars(members.union(select(AdapterRow.__table__.c.namespace))))


def _public(session: Session) -> set[str]:
    table = AdapterRow.__table__.c
    return set(session.scalars(select(table.namespace).distinct().where(~table.private)))

"""Namespaces: who may see, publish and decide in them.

A namespace that nobody has published in belongs to the first who does, and to an admin always. One that holds adapters
and has no members (it was filled while access was open) waits for an admin to name an owner.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, Select, delete, exists, select
from sqlalchemy.orm import Session

from composer.errors import NotFoundError, UsageError
from registry.access import Principal, Role, Scope
from registry.db import session_scope
from registry.errors import ForbiddenError
from registry.models import AdapterRow, MemberRow, RepositoryRow
from registry.names import DEFAULT_NAMESPACE, subject_name, valid_name
from registry.schemas import Member, NamespaceInfo, Page
from registry.services.audit import acting, record
from registry.services.name_checks import refuse_confusable

__all__ = ["Namespaces", "hidden_adapters", "hidden_repositories", "require_role"]

ORDER = list(Role)
MAX_PAGE = 1000


def member_namespaces(principal: Principal) -> Select[tuple[str]]:
    """The namespaces in which a subject is anything, within the limits of its token."""
    table = MemberRow.__table__
    query = select(table.c.namespace).where(table.c.subject == principal.subject)
    return query if principal.namespaces is None else query.where(table.c.namespace.in_(sorted(principal.namespaces)))


def hidden_adapters(principal: Principal) -> Select[tuple[int]]:
    """The ids of private adapters that a principal must not learn of."""
    return _hidden(AdapterRow.__table__, principal)


def hidden_repositories(principal: Principal) -> Select[tuple[int]]:
    """The same of repositories, drafts included."""
    return _hidden(RepositoryRow.__table__, principal)


def _hidden(table: Any, principal: Principal) -> Select[tuple[int]]:
    query = select(table.c.id).where(table.c.private, table.c.namespace.not_in(member_namespaces(principal)))
    if Scope.ADMIN in principal.scopes:  # of some namespaces only
        query = query.where(table.c.namespace.not_in(sorted(principal.namespaces or ())))
    return query


def require_role(session: Session, namespace: str, role: Role, *, claim: bool = False) -> None:
    """Raise ForbiddenError unless the acting principal has at least `role`; with `claim`, a free namespace is taken.

    Raises ConfusableNameError where that one could be mistaken for a namespace of others.
    """
    principal = acting(session)
    if principal.is_admin:
        return
    within = principal.namespaces is None or namespace in principal.namespaces
    if within and Scope.ADMIN in principal.scopes:
        return
    held = session.get(MemberRow, (namespace, principal.subject))
    if within and held is not None and ORDER.index(Role(held.role)) >= ORDER.index(role):
        return
    if within and claim and namespace != DEFAULT_NAMESPACE and not _taken(session, namespace):
        refuse_confusable(session, namespace, principal.subject)
        session.add(MemberRow(namespace=namespace, subject=principal.subject, role=Role.OWNER.value))
        record(session, "namespace.claim", namespace)
        return
    raise ForbiddenError(
        f"{principal.subject} may not do this in the namespace {namespace!r}",
        expected=f"{role.value} of {namespace}, with a token that is good for it",
        found=f"{principal.subject}, {held.role if held else 'no member'}",
        remedy=f"ask an owner: 'registry namespace grant {namespace} {principal.subject} {role.value}'",
    )


def _taken(session: Session, namespace: str) -> bool:
    members = exists().where(MemberRow.__table__.c.namespace == namespace)
    adapters = exists().where(AdapterRow.__table__.c.namespace == namespace)
    return bool(session.scalar(select(members | adapters)))


class Namespaces:
    """Lists and changes members, and what is private."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def list(self, limit: int, cursor: str | None) -> Page[NamespaceInfo]:
        """Namespaces with members that the principal is one of; all for an admin."""
        limit = max(1, min(limit, MAX_PAGE))
        with session_scope(self._engine) as session:
            query = select(MemberRow.namespace).distinct().order_by(MemberRow.namespace).limit(limit + 1)
            principal = acting(session)
            if not principal.is_admin:
                query = query.where(MemberRow.namespace.in_(member_namespaces(principal)))
            names = list(session.scalars(query.where(MemberRow.namespace > cursor) if cursor else query))
            items = tuple(_info(session, name) for name in names[:limit])
        return Page(items=items, next=names[limit - 1] if len(names) > limit else None)

    def grant(self, namespace: str, subject: str, role: Role) -> NamespaceInfo:
        """Make a subject a member, or change its role. Only for owners and admins."""
        if not valid_name(namespace):
            raise UsageError(f"{namespace!r} is not a namespace", expected="such as team", found=namespace)
        subject_name(subject)
        with session_scope(self._engine, writes=True) as session:
            require_role(session, namespace, Role.OWNER)
            held = session.get(MemberRow, (namespace, subject))
            if held is None:
                session.add(MemberRow(namespace=namespace, subject=subject, role=role.value))
            else:
                held.role = role.value
            record(session, "namespace.grant", namespace, subject=subject, role=role.value)
            session.flush()
            return _info(session, namespace)

    def revoke(self, namespace: str, subject: str) -> NamespaceInfo:
        """Take a subject out of a namespace. Raises NotFoundError where it is not in it."""
        with session_scope(self._engine, writes=True) as session:
            require_role(session, namespace, Role.OWNER)
            gone = session.execute(
                delete(MemberRow).where(MemberRow.namespace == namespace, MemberRow.subject == subject)
            )
            if not gone.rowcount:
                raise NotFoundError(
                    f"{subject} is no member of {namespace}", expected="a member", found=subject,
                    remedy="see 'registry namespace list'",
                )  # fmt: skip
            record(session, "namespace.revoke", namespace, subject=subject)
            return _info(session, namespace)


def _info(session: Session, namespace: str) -> NamespaceInfo:
    rows = session.scalars(select(MemberRow).where(MemberRow.namespace == namespace).order_by(MemberRow.subject))
    return NamespaceInfo(
        name=namespace, members=tuple(Member(subject=row.subject, role=Role(row.role)) for row in rows)
    )

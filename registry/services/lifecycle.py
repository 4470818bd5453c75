"""The life of a version: yank, deprecate, quarantine, delete; and removing a base that nothing needs.

Each is a change of a state or a guarded removal, written into the audit log in the same transaction.
"""

from __future__ import annotations

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from composer.errors import ConflictError, UsageError
from registry.access import Role, Scope
from registry.db import session_scope
from registry.errors import DependentsError
from registry.lifecycle import quarantined
from registry.models import (
    AliasRow,
    BaseModelRow,
    CompositionInputRow,
    CompositionRow,
    QuarantineRow,
    TombstoneRow,
    VersionRow,
)
from registry.schemas import VersionInfo, VersionState
from registry.services.audit import acting, record
from registry.services.catalogue import find_base, find_version, refresh_latest, version_info
from registry.services.namespaces import require_role

__all__ = ["Lifecycle", "refuse_quarantined", "refuse_tainted"]

LISTED = 10
MAX_REASON = 2000


def refuse_quarantined(session: Session, digest: str, label: str) -> None:
    """Raise QuarantinedError when these bytes may not be used, wherever they lie."""
    row = session.get(QuarantineRow, digest)
    if row is not None:
        raise quarantined(label, digest, row.reason)


def refuse_tainted(session: Session, base: BaseModelRow) -> None:
    """Raise QuarantinedError for a base into which bytes are merged that may not be used."""
    for digest in base.made_of or ():
        refuse_quarantined(session, digest, base.name)


class Lifecycle:
    """Changes states and removes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def yank(self, ref: str, version: str | None, reason: str | None) -> VersionInfo:
        """Withdraw a version, or with `reason` None publish it again. Its digest goes on working."""
        with session_scope(self._engine, writes=True) as session:
            row = _version(session, ref, version, Role.PUBLISHER)
            wanted = VersionState.YANKED if reason is not None else VersionState.PUBLISHED
            if row.state == VersionState.QUARANTINED:
                raise ConflictError(
                    f"{_label(row)} is quarantined", expected="a version that is not", found=row.state,
                    remedy="an admin may lift that with 'registry quarantine --lift'",
                )  # fmt: skip
            row.state, row.state_reason = wanted.value, None if reason is None else _reason(reason)
            row.latest = False
            refresh_latest(session, row.adapter_id)
            record(session, "yank" if reason is not None else "unyank", _label(row), reason=reason)
            session.flush()
            return version_info(session, row)

    def deprecate(self, ref: str, version: str | None, reason: str | None, successor: str | None) -> VersionInfo:
        """Warn all who use a version, and name its successor; with `reason` None no longer."""
        with session_scope(self._engine, writes=True) as session:
            row = _version(session, ref, version, Role.PUBLISHER)
            if successor is not None:
                if reason is None:
                    raise UsageError("a successor needs a reason", expected="why it is deprecated", found="none")
                name, _, wanted = successor.partition("@")
                successor = _label(find_version(session, name, wanted or None))
                if successor == _label(row):
                    raise UsageError("a version cannot succeed itself", expected="another version", found=successor)
            row.deprecated, row.successor = None if reason is None else _reason(reason), successor
            record(session, "deprecate", _label(row), reason=reason, successor=successor)
            session.flush()
            return version_info(session, row)

    def quarantine(self, ref: str, version: str | None, reason: str | None) -> tuple[VersionInfo, ...]:
        """Block the bytes of a version everywhere, or with `reason` None lift that. Only for an admin."""
        with session_scope(self._engine, writes=True) as session:
            acting(session).require_everywhere(Scope.ADMIN)
            row = find_version(session, ref, version)
            held = session.get(QuarantineRow, row.digest)
            if reason is None:
                if held is None:
                    raise ConflictError(f"{_label(row)} is not quarantined", expected="quarantined", found=row.state)
                session.delete(held)
            elif held is None:
                session.add(QuarantineRow(digest=row.digest, reason=_reason(reason)))
            else:
                held.reason = _reason(reason)
            state = VersionState.PUBLISHED if reason is None else VersionState.QUARANTINED
            same = list(session.scalars(select(VersionRow).where(VersionRow.digest == row.digest)))
            for item in same:
                item.state, item.state_reason, item.latest = state.value, reason, False
            session.flush()
            for adapter_id in {item.adapter_id for item in same}:
                refresh_latest(session, adapter_id)
            record(
                session, "quarantine" if reason is not None else "quarantine.lift", row.digest,
                reason=reason, versions=[_label(item) for item in same],
            )  # fmt: skip
            session.flush()
            return tuple(version_info(session, item) for item in same)

    def delete(self, ref: str, version: str | None) -> None:
        """Remove a version that nothing depends on; its name is never given again. For owners.

        Raises DependentsError when aliases, successors or recorded compositions name it.
        """
        with session_scope(self._engine, writes=True) as session:
            row = _version(session, ref, version, Role.OWNER)
            label = _label(row)
            users = [f"alias {label.partition('@')[0]}@{alias}" for alias in session.scalars(
                select(AliasRow.alias).where(AliasRow.version_id == row.id).limit(LISTED))]  # fmt: skip
            users += [f"deprecated {_label(item)}" for item in session.scalars(
                select(VersionRow).where(VersionRow.successor == label).limit(LISTED))]  # fmt: skip
            others = select(VersionRow.id).where(VersionRow.digest == row.digest, VersionRow.id != row.id)
            if session.scalar(others.limit(1)) is None:
                users += _compositions(session, row.digest)
            _refuse_in_use(label, users)
            session.add(
                TombstoneRow(
                    namespace=row.adapter.namespace, name=row.adapter.name, version=row.version, digest=row.digest
                )
            )
            record(session, "delete", label, digest=row.digest)
            adapter_id = row.adapter_id
            session.delete(row)
            session.flush()
            refresh_latest(session, adapter_id)

    def remove_base(self, ref: str) -> None:
        """Forget a base that no adapter, descendant or recorded composition needs. Only for an admin."""
        with session_scope(self._engine, writes=True) as session:
            acting(session).require_everywhere(Scope.ADMIN)
            row = find_base(session, ref)
            trained = select(VersionRow).where(VersionRow.base_fingerprint == row.fingerprint)
            users = [f"adapter {_label(item)}" for item in session.scalars(trained.limit(LISTED))]
            children = select(BaseModelRow.name).where(BaseModelRow.parent_id == row.id)
            users += [f"base {name}" for name in session.scalars(children.limit(LISTED))]
            _refuse_in_use(row.name, [*users, *_compositions(session, row.fingerprint)])
            record(session, "base.remove", row.name, fingerprint=row.fingerprint)
            session.execute(delete(BaseModelRow).where(BaseModelRow.id == row.id))


def _version(session: Session, ref: str, version: str | None, role: Role) -> VersionRow:
    row = find_version(session, ref, version)
    require_role(session, row.adapter.namespace, role)
    return row


def _label(row: VersionRow) -> str:
    return f"{row.adapter.full_name}@{row.version}"


def _reason(text: str) -> str:
    if not 1 <= len(text.strip()) <= MAX_REASON:
        raise UsageError(f"a reason has 1 to {MAX_REASON} characters", expected="why", found=len(text))
    return text.strip()


def _compositions(session: Session, digest: str) -> list[str]:
    query = select(CompositionRow.output_digest).join(CompositionInputRow)
    found = session.scalars(query.where(CompositionInputRow.digest == digest).limit(LISTED))
    return [f"composition {output}" for output in found]


def _refuse_in_use(what: str, users: list[str]) -> None:
    if users:
        raise DependentsError(
            f"{what} is in use: {', '.join(users[:3])}" + (f" and {len(users) - 3} more" if len(users) > 3 else ""),
            expected="nothing that depends on it",
            found=users,
            remedy="move aliases, delete adapters, or let records go with 'registry gc --keep-records'; a version can "
            "be yanked at once",
            dependents=users,
        )

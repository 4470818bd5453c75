"""Which adapters fit a base, and which bases an adapter fits: level by level, page by page.

    exact         the same fingerprint                          an index, newest first
    same-values   bases of the same values                      the same index
    lineage       bases of the closure table                    the same index
    shape         signatures that bind to the base              an index of signatures, of which there are few
    incompatible  the other signatures

A level is asked only when those before it are exhausted, so the first page costs what it shows, however many adapters
there are. A cursor names the level and the last one seen. A signature is bound to a base once and remembered: neither
ever changes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import ColumnElement, Engine, Select, and_, false, func, or_, select
from sqlalchemy.orm import Session, selectinload

from composer.adapters import Binding, Target, bind_targets
from composer.errors import UsageError
from registry.compat import BaseFacts, assess, better_or_equal
from registry.db import session_scope
from registry.models import BaseModelRow, BaseTensorRow, SignatureRow, SignatureTargetRow, VersionRow
from registry.schemas import BaseFit, CompatibleAdapter, Level, Page, Verdict
from registry.services.catalogue import (
    base_facts,
    base_info,
    find_base,
    find_version,
    tensor_count,
    version_claim,
    version_infos,
)

__all__ = ["Matching", "level_page", "version_verdict"]

T = TypeVar("T", int, str)

MAX_PAGE = 1000
REMEMBERED = 200_000
LEVELS = list(Level)


class _Bindings:
    """Remembers how signatures bind to bases, by fingerprint and digest."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], Binding] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, session: Session, signature: str | None, base: BaseFacts) -> Binding:
        """The binding of one signature on one base."""
        if signature is None:
            return Binding()
        key = (base.fingerprint, signature)
        with self._lock:
            found = self._known.get(key)
        if found is None:
            found = bind_targets(signature_targets(session, signature), base.shapes)
            with self._lock:
                self._known[key] = found
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
        return found


BINDINGS = _Bindings()


def signature_targets(session: Session, signature: str | None) -> tuple[Target, ...]:
    """The targets of a signature, in the order of their names."""
    rows = session.execute(
        select(SignatureTargetRow.parameter, SignatureTargetRow.shape)
        .where(SignatureTargetRow.signature == signature)
        .order_by(SignatureTargetRow.parameter)
    )
    return tuple(Target(parameter, tuple(shape)) for parameter, shape in rows)


def version_verdict(session: Session, version: VersionRow, facts: BaseFacts) -> Verdict:
    """The verdict for a published version on a base."""
    return assess(
        signature_targets(session, version.signature),
        version_claim(session, version),
        facts,
        _differing(session, version.base_fingerprint, facts.fingerprint),
        binding=BINDINGS.get(session, version.signature, facts),
    )


def _differing(session: Session, one: str | None, other: str) -> tuple[str, ...] | None:
    """Names of the tensors in which two bases differ; None unless both are registered and not the same."""
    if one in (None, other):
        return None
    rows = [
        dict(session.execute(select(BaseTensorRow.name, BaseTensorRow.digest).join(BaseModelRow).where(
            BaseModelRow.fingerprint == wanted)).tuples().all())
        for wanted in (one, other)
    ]  # fmt: skip
    if not all(rows):
        return None
    return tuple(sorted(name for name in rows[0].keys() | rows[1].keys() if rows[0].get(name) != rows[1].get(name)))


def level_page(condition: ColumnElement[bool], limit: int, before: int | None) -> Select[tuple[VersionRow]]:
    """The latest versions that fulfil a condition, newest first, after the one of the number `before`."""
    query = select(VersionRow).where(VersionRow.latest, condition)
    return (
        (query if before is None else query.where(VersionRow.id < before)).order_by(VersionRow.id.desc()).limit(limit)
    )


@dataclass(frozen=True, slots=True)
class _Stage:
    """One level of a listing: what its rows fulfil."""

    level: Level
    condition: ColumnElement[bool]


class Matching:
    """Both directions of compatibility."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def compatible(self, base: str, level: Level, limit: int, cursor: str | None) -> Page[CompatibleAdapter]:
        """Latest versions that fit a base at `level` or better: best first, then the newest."""
        limit = max(1, min(limit, MAX_PAGE))
        first, before = _place(cursor, int)
        found: list[tuple[VersionRow, Verdict]] = []
        with session_scope(self._engine) as session:
            row = find_base(session, base)
            facts = base_facts(session, row)
            following = None
            for stage in _stages(session, row, facts):
                if LEVELS.index(stage.level) < first or not better_or_equal(stage.level, level):
                    continue
                page = level_page(stage.condition, limit + 1 - len(found), before)
                rows = session.scalars(page.options(selectinload(VersionRow.files)))
                before = None
                found += [(item, version_verdict(session, item, facts)) for item in rows]
                if len(found) > limit:
                    last, verdict = found[limit - 1]
                    following = f"{LEVELS.index(verdict.level)}.{last.id}"
                    break
            shown = found[:limit]
            infos = version_infos(session, [item for item, _ in shown])
            items = tuple(
                CompatibleAdapter(adapter=info, verdict=verdict)
                for info, (_, verdict) in zip(infos, shown, strict=True)
            )
        return Page(items=items, next=following)

    def bases_for(self, ref: str, version: str | None, level: Level, limit: int, cursor: str | None) -> Page[BaseFit]:
        """Registered bases that a version fits at `level` or better: best first, then by name."""
        limit = max(1, min(limit, MAX_PAGE))
        first, after = _place(cursor, str)
        items: list[BaseFit] = []
        with session_scope(self._engine) as session:
            row = find_version(session, ref, version)
            for wanted, candidates in self._base_stages(session, row):
                if LEVELS.index(wanted) < first or not better_or_equal(wanted, level):
                    continue
                later = candidates if after is None else candidates.where(BaseModelRow.name > after)
                after = None
                for base in session.scalars(later.order_by(BaseModelRow.name)):
                    verdict = version_verdict(session, row, base_facts(session, base))
                    if verdict.level is not wanted:
                        continue
                    if len(items) == limit:
                        last = items[-1]
                        return Page(items=tuple(items), next=f"{LEVELS.index(last.verdict.level)}.{last.base.name}")
                    items.append(BaseFit(base=base_info(base, tensor_count(session, base)), verdict=verdict))
        return Page(items=tuple(items), next=None)

    @staticmethod
    def _base_stages(session: Session, version: VersionRow) -> Iterator[tuple[Level, Select[tuple[BaseModelRow]]]]:
        """For each level a query whose rows hold all the bases of that level, and few others."""
        claim = version_claim(session, version)
        own = BaseModelRow.fingerprint == claim.fingerprint if claim.fingerprint else false()
        same = false()
        if claim.value_root:
            same = and_(BaseModelRow.value_root == claim.value_root, BaseModelRow.config_digest == claim.config_digest)
        related = false()
        known = session.scalar(select(BaseModelRow).where(own)) if claim.fingerprint else None
        if known is not None:
            related = BaseModelRow.fingerprint.in_(list(base_facts(session, known).relatives))
        every = select(BaseModelRow)
        yield Level.EXACT, every.where(own)
        yield Level.SAME_VALUES, every.where(same, ~own)
        yield Level.LINEAGE, every.where(related, ~own, ~same)
        rest = every.where(~own, ~same, ~related)
        yield Level.SHAPE, rest
        yield Level.INCOMPATIBLE, every


def _stages(session: Session, row: BaseModelRow, facts: BaseFacts) -> Iterator[_Stage]:
    """The levels of a base, best first; no version fulfils two."""
    fitting = [
        digest
        for digest in session.scalars(select(SignatureRow.digest))
        if not BINDINGS.get(session, digest, facts).mismatches
    ]
    fits = or_(VersionRow.signature.in_(fitting), VersionRow.signature.is_(None))
    own = VersionRow.base_fingerprint == row.fingerprint
    twins = select(BaseModelRow.fingerprint).where(
        BaseModelRow.value_root == row.value_root, BaseModelRow.config_digest == row.config_digest
    )
    same_bases = [item for item in session.scalars(twins) if item != row.fingerprint]
    values = and_(
        VersionRow.base_value_root == row.value_root,
        VersionRow.base_config_digest == row.config_digest,
        func.coalesce(VersionRow.base_fingerprint, "") != row.fingerprint,
    )
    same = or_(VersionRow.base_fingerprint.in_(same_bases), values)
    relatives = [item for item in facts.relatives if item not in same_bases]
    yield _Stage(Level.EXACT, and_(own, fits))
    yield _Stage(Level.SAME_VALUES, and_(same, fits))
    yield _Stage(Level.LINEAGE, and_(VersionRow.base_fingerprint.in_(relatives), _not_values(row), fits))
    others = [row.fingerprint, *same_bases, *relatives]
    unrelated = or_(VersionRow.base_fingerprint.is_(None), VersionRow.base_fingerprint.not_in(others))
    yield _Stage(Level.SHAPE, and_(VersionRow.signature.in_(fitting), unrelated, _not_values(row)))
    yield _Stage(Level.INCOMPATIBLE, VersionRow.signature.not_in(fitting))


def _not_values(row: BaseModelRow) -> ColumnElement[bool]:
    return or_(
        VersionRow.base_value_root.is_(None),
        VersionRow.base_value_root != row.value_root,
        VersionRow.base_config_digest != row.config_digest,
    )


def _place(cursor: str | None, kind: type[T]) -> tuple[int, T | None]:
    """The level's number and the last one seen. Raises UsageError for what is no cursor of these listings."""
    if cursor is None:
        return 0, None
    level, dot, last = cursor.partition(".")
    try:
        if not dot or not 0 <= int(level) < len(LEVELS):
            raise ValueError(cursor)
        place = kind(last)
        if isinstance(place, int) and not 0 <= place < 1 << 63:
            raise ValueError(cursor)
        return int(level), place
    except ValueError:
        raise UsageError(
            f"{cursor!r} is no cursor of this listing", expected="the `next` of a page", found=cursor
        ) from None

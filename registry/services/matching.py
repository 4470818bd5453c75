"""Which adapters fit a base, and which bases an adapter fits: level by level, page by page.

    exact         the same fingerprint                          an index, newest first
    same-values   bases of the same values                      the same index
    lineage       bases of the closure table                    the same index
    shape         signatures that bind to the base              the few signatures that bind, or a walk
    incompatible  the other signatures

A level is asked only when those before it are exhausted, so the first page costs what it shows, however many adapters
there are. A cursor names the level and the last one seen. A signature is bound to a base once and remembered: neither
ever changes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Connection, Engine, Select, and_, false, func, or_, select, true
from sqlalchemy.orm import Session, aliased, selectinload

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

__all__ = ["Matching", "Part", "levels_of", "newest_rows", "version_verdict"]

T = TypeVar("T", int, str)
V = TypeVar("V")
T_Row = TypeVar("T_Row", bound=tuple[Any, ...])

MAX_PAGE = 1000
CHUNK = 500
WALK_FROM = 0.05  # from this share of the signatures on
WIDE, RECENT = 200, 500
LEVELS = list(Level)


class _Memory(Generic[V]):
    """What never changes, by key; the least used goes first."""

    def __init__(self, size: int) -> None:
        self._known: OrderedDict[Any, V] = OrderedDict()
        self._size = size
        self._lock = threading.Lock()

    def get(self, key: Any) -> V | None:
        """What is known, None where nothing is."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def put(self, key: Any, value: V) -> V:
        """Remember, and forget the least used."""
        with self._lock:
            self._known[key] = value
            while len(self._known) > self._size:
                self._known.popitem(last=False)
        return value


TARGETS: _Memory[tuple[Target, ...]] = _Memory(10_000)
BINDINGS: _Memory[Binding] = _Memory(200_000)
LEAVES: _Memory[dict[str, str]] = _Memory(64)


def signature_targets(session: Session, signatures: Iterable[str]) -> dict[str, tuple[Target, ...]]:
    """The targets of signatures, in the order of their names."""
    found = {digest: TARGETS.get(digest) for digest in signatures}
    missing = sorted(digest for digest, targets in found.items() if targets is None)
    for start in range(0, len(missing), CHUNK):
        rows = session.execute(
            select(SignatureTargetRow.signature, SignatureTargetRow.parameter, SignatureTargetRow.shape)
            .where(SignatureTargetRow.signature.in_(missing[start : start + CHUNK]))
            .order_by(SignatureTargetRow.signature, SignatureTargetRow.parameter)
        ).tuples()
        read: dict[str, list[Target]] = {digest: [] for digest in missing[start : start + CHUNK]}
        for digest, parameter, shape in rows:
            read[digest].append(Target.of(parameter, shape))
        found |= {digest: TARGETS.put(digest, tuple(targets)) for digest, targets in read.items()}
    return {digest: targets or () for digest, targets in found.items()}


def bindings(session: Session, signatures: Iterable[str], base: BaseFacts) -> dict[str, Binding]:
    """How signatures bind to a base."""
    found = {digest: BINDINGS.get((base.fingerprint, digest)) for digest in signatures}
    missing = [digest for digest, binding in found.items() if binding is None]
    for digest, targets in signature_targets(session, missing).items():
        found[digest] = BINDINGS.put((base.fingerprint, digest), bind_targets(targets, base.shapes))
    return {digest: binding for digest, binding in found.items() if binding is not None}


def version_verdict(session: Session, version: VersionRow, facts: BaseFacts) -> Verdict:
    """The verdict for a published version on a base."""
    signature = version.signature or ""
    return assess(
        signature_targets(session, [signature])[signature],
        version_claim(session, version),
        facts,
        _differing(session, version.base_fingerprint, facts.fingerprint),
        binding=bindings(session, [signature], facts)[signature],
    )


def _differing(session: Session, one: str | None, other: str) -> tuple[str, ...] | None:
    """Names of the tensors in which two bases differ; None unless both are registered and not the same."""
    if one is None or one == other:
        return None
    mine, theirs = _leaves(session, one), _leaves(session, other)
    if not mine or not theirs:
        return None
    return tuple(sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)))


def _leaves(session: Session, fingerprint: str) -> dict[str, str]:
    found = LEAVES.get(fingerprint)
    if found is None:
        query = select(BaseTensorRow.name, BaseTensorRow.digest).join(BaseModelRow)
        found = dict(session.execute(query.where(BaseModelRow.fingerprint == fingerprint)).tuples().all())
        if found:
            LEAVES.put(fingerprint, found)
    return found


@dataclass(frozen=True, slots=True)
class Part:
    """Latest versions with one of `values` in an indexed column, or with any; and what else they fulfil.

    `walk`: so many have one that the versions are walked from the newest, in place of looking each value up.
    """

    column: Any = None
    values: tuple[str, ...] = ()
    condition: ColumnElement[bool] = field(default_factory=true)
    walk: bool = False

    def page(self, connection: Session | Connection, limit: int, before: int | None) -> list[int]:
        """Their numbers, the newest first, up to `limit`.

        Very many values are those of many versions, mostly: then a page is full after a look at the newest of all.
        """
        if len(self.values) > WIDE and not self.walk:
            query = select(VersionRow.id, self.column).where(VersionRow.latest, self.condition)
            query = query if before is None else query.where(VersionRow.id < before)
            wanted = frozenset(self.values)
            recent = connection.execute(query.order_by(VersionRow.id.desc()).limit(RECENT))
            found = [number for number, value in recent if value in wanted][:limit]
            if len(found) == limit:
                return found
        dialect = connection.get_bind().dialect.name if isinstance(connection, Session) else connection.dialect.name
        return [row[0] for row in connection.execute(self.newest(dialect, limit, before))]

    def having_one(self, query: Select[T_Row], before: int | None) -> Select[T_Row]:
        """A query narrowed to those that have the only value."""
        narrowed = query.where(VersionRow.latest, self.condition, self.column == self.values[0])
        return narrowed if before is None else narrowed.where(VersionRow.id < before)

    def newest(self, dialect: str, limit: int, before: int | None) -> Select[tuple[int]]:
        """Their numbers, the newest first.

        Of many values only those count whose own newest is among the `limit` newest of all values: any other value has
        that many newer numbers before its first. So one number is read for each value, and `limit` for few of them.
        """
        query = select(VersionRow.id).where(VersionRow.latest, self.condition)
        if before is not None:
            query = query.where(VersionRow.id < before)
        order = VersionRow.id.desc()
        if self.column is None:
            return query.order_by(order).limit(limit)
        if self.walk:  # a function keeps planners from the column's index
            return query.where(func.coalesce(self.column, "").in_(self.values)).order_by(order).limit(limit)
        if len(self.values) == 1:
            return self.having_one(select(VersionRow.id), before).order_by(order).limit(limit)
        source, key = SOURCES[self.column.key]
        first = query.where(self.column == key).order_by(order).limit(1).correlate(source).scalar_subquery()
        values = select(key.label("value")).where(key.in_(self.values)).order_by(first.desc().nulls_last())
        leading = values.limit(limit).subquery()
        top = query.where(self.column == leading.c.value).order_by(order).limit(limit).correlate(leading)
        if dialect == "postgresql":
            each = top.lateral()
            found = select(each.c.id).select_from(leading).join(each, true())
            return found.order_by(each.c.id.desc()).limit(limit)
        chosen = aliased(VersionRow)
        found = select(chosen.id).select_from(leading).join(chosen, chosen.id.in_(top))
        return found.order_by(chosen.id.desc()).limit(limit)


SOURCES: dict[str, tuple[Any, Any]] = {
    "base_fingerprint": (BaseModelRow, BaseModelRow.fingerprint),
    "signature": (SignatureRow, SignatureRow.digest),
}


def newest_rows(
    connection: Session | Connection, parts: tuple[Part, ...], limit: int, before: int | None, *options: Any
) -> Select[tuple[VersionRow]]:
    """The statement of a page: the newest versions of several parts, up to `limit`.

    One value of an indexed column, as of an exact base, is read at once; of other parts the numbers are read first.
    """
    query, order = select(VersionRow).options(*options), VersionRow.id.desc()
    if len(parts) == 1 and parts[0].column is not None and len(parts[0].values) == 1 and not parts[0].walk:
        return parts[0].having_one(query, before).order_by(order).limit(limit)
    numbers = sorted({number for part in parts for number in part.page(connection, limit, before)}, reverse=True)
    return query.where(VersionRow.id.in_(numbers[:limit])).order_by(order)


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
            facts = base_facts(session, row, lazy=True)
            following = None
            for wanted, ask in levels_of(session, row, facts).items():
                if LEVELS.index(wanted) < first or not better_or_equal(wanted, level):
                    continue
                parts = ask()
                while len(found) <= limit:
                    need = limit + 1 - len(found)
                    page = newest_rows(session, parts, need, before, selectinload(VersionRow.files))
                    rows = session.scalars(page).all()
                    judged = ((row, version_verdict(session, row, facts)) for row in rows)
                    found += [item for item in judged if item[1].level is wanted]
                    before = rows[-1].id if rows else None
                    if len(rows) < need:
                        break
                before = None
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
                    verdict = version_verdict(session, row, base_facts(session, base, lazy=True))
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


def levels_of(session: Session, row: BaseModelRow, facts: BaseFacts) -> dict[Level, Callable[[], tuple[Part, ...]]]:
    """The versions of each level for one base, best first, each level computed when it is asked for.

    Those before shape may hold some that do not bind.
    """
    base = VersionRow.base_fingerprint

    @cache
    def same() -> tuple[str, ...]:
        twins = select(BaseModelRow.fingerprint).where(
            BaseModelRow.value_root == row.value_root, BaseModelRow.config_digest == row.config_digest
        )
        return tuple(item for item in session.scalars(twins) if item != row.fingerprint)

    @cache
    def relatives() -> tuple[str, ...]:
        return tuple(item for item in facts.relatives if item not in same())

    @cache
    def signatures() -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those that fit, and the others."""
        found = bindings(session, session.scalars(select(SignatureRow.digest)), facts)
        fitting = tuple(digest for digest, binding in found.items() if not binding.mismatches)
        return fitting, tuple(digest for digest, binding in found.items() if binding.mismatches)

    def many() -> bool:
        fitting, others = signatures()
        return len(fitting) > WALK_FROM * (len(fitting) + len(others))

    def same_values() -> tuple[Part, ...]:
        values = and_(
            VersionRow.base_value_root == row.value_root,
            VersionRow.base_config_digest == row.config_digest,
            func.coalesce(base, "") != row.fingerprint,
        )
        return (Part(condition=values), *([Part(base, same())] if same() else []))

    def shape() -> tuple[Part, ...]:
        unrelated = func.coalesce(base, "").not_in([row.fingerprint, *same(), *relatives()])
        return (Part(VersionRow.signature, signatures()[0], and_(unrelated, _not_values(row)), walk=many()),)

    return {
        Level.EXACT: lambda: (Part(base, (row.fingerprint,)),),
        Level.SAME_VALUES: same_values,
        Level.LINEAGE: lambda: (Part(base, relatives()),) if relatives() else (),
        Level.SHAPE: shape,
        Level.INCOMPATIBLE: lambda: (Part(VersionRow.signature, signatures()[1], walk=not many()),),
    }


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

"""Finding adapters by words and properties, newest first.

Rare words are looked up in the text index of the database (SQLite: FTS5, PostgreSQL: GIN). Of common ones a short walk
from the newest fills a page: SQLite counts them within a base, PostgreSQL's planner estimates them everywhere. With a
base of few versions these are read and their words compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Engine, Select, column, func, literal, literal_column, select, table, text
from sqlalchemy.orm import Session, selectinload

from composer.errors import UsageError
from registry.db import session_scope
from registry.models import AdapterRow, VersionRow, VersionTagRow
from registry.schemas import Page, VersionInfo
from registry.services.catalogue import find_base, version_infos
from registry.words import query_words

__all__ = ["Query", "Search", "prefers_text", "search_page"]

MAX_PAGE = 1000
MAX_WORDS = 20
FEW = 2000
FEW_OF_BASE = 8000  # which PostgreSQL reads sooner than it looks up two words
ESTIMATES = text(
    "EXPLAIN (FORMAT JSON) SELECT FROM adapter_versions"
    " WHERE latest AND to_tsvector('simple', search_text) @@ to_tsquery('simple', :words)"
    " UNION ALL SELECT FROM adapter_versions WHERE latest AND base_fingerprint = :base"
)
TEXT = table("version_text", column("rowid"), column("version_text"))


@dataclass(frozen=True, slots=True)
class Query:
    """What a version must be; what is None or empty asks nothing."""

    text: str = ""
    namespace: str | None = None
    kind: str | None = None
    rank: int | None = None
    task: str | None = None
    license: str | None = None
    base: str | None = None
    tag: str | None = None


class Search:
    """Runs queries."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def page(self, query: Query, limit: int, cursor: str | None) -> Page[VersionInfo]:
        """Latest versions that fulfil the query, newest first; the cursor is the last number seen."""
        limit = max(1, min(limit, MAX_PAGE))
        if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
            raise UsageError(f"{cursor!r} is no cursor of this listing", expected="the `next` of a page", found=cursor)
        words = query_words(query.text)
        if query.text.strip() and not words:
            return Page(items=(), next=None)
        if len(words) > MAX_WORDS:
            raise UsageError(f"a search has at most {MAX_WORDS} words", expected=MAX_WORDS, found=len(words))
        with session_scope(self._engine) as session:
            base = find_base(session, query.base).fingerprint if query.base else None
            dialect = self._engine.dialect.name
            by_text = prefers_text(session, dialect, words, base)
            before = int(cursor) if cursor else None
            statement = search_page(dialect, query, words, base, limit + 1, before, by_text=by_text)
            rows = session.scalars(statement.options(selectinload(VersionRow.files))).all()
            items = tuple(version_infos(session, rows[:limit]))
        return Page(items=items, next=str(rows[limit - 1].id) if len(rows) > limit else None)


def prefers_text(session: Session, dialect: str, words: tuple[str, ...], base: str | None) -> bool:
    """Whether the text index should find the versions that hold some words, or these be walked from the newest."""
    if not words:
        return False
    if dialect != "sqlite":
        plan = session.execute(ESTIMATES, {"words": _tsquery(words), "base": base or ""}).scalar_one()
        of_words, of_base = (part["Plan Rows"] for part in plan[0]["Plan"]["Plans"])
        return of_words <= FEW and (base is None or of_base > FEW_OF_BASE)
    if base is None:
        return True
    of_base = select(VersionRow.id).where(VersionRow.latest, VersionRow.base_fingerprint == base).limit(FEW + 1)
    matching = select(TEXT.c.rowid).where(_matches(words)).limit(FEW + 1)
    return _count(session, of_base) > FEW and _count(session, matching) <= FEW


def _tsquery(words: tuple[str, ...]) -> str:
    return " & ".join(f"{word}:*" for word in words)


def _count(session: Session, query: Select[Any]) -> int:
    return session.scalar(select(func.count()).select_from(query.subquery())) or 0


def _matches(words: tuple[str, ...]) -> ColumnElement[bool]:
    return TEXT.c.version_text.op("MATCH", is_comparison=True)(" ".join(f'"{word}"*' for word in words))


def search_page(
    dialect: str,
    query: Query,
    words: tuple[str, ...],
    base: str | None,
    limit: int,
    before: int | None,
    *,
    by_text: bool,
) -> Select[tuple[VersionRow]]:
    """The statement of one page. base: the fingerprint that query.base names; by_text: the text index has a part."""
    statement = select(VersionRow).where(VersionRow.latest)
    order: Any = VersionRow.id
    if base is not None:
        # A function keeps planners from the base's index where the text index is to be the one.
        indexed = not (words and by_text)
        held = VersionRow.base_fingerprint if indexed else func.coalesce(VersionRow.base_fingerprint, "")
        statement = statement.where(held == base)
    if words and not by_text:
        for word in words:
            # In the statement itself: a plan that was made for any word at all would not be for one that is common.
            statement = statement.where(VersionRow.search_text.like(literal(f"% {word}%", literal_execute=True)))
    elif words and dialect == "sqlite":
        statement = statement.join(TEXT, TEXT.c.rowid == VersionRow.id)
        statement = statement.where(_matches(words))
        order = TEXT.c.rowid  # in whose order the index gives its rows, so that a page needs no sort
    elif words:
        simple = literal_column("'simple'")
        wanted = func.to_tsquery(simple, _tsquery(words))
        statement = statement.where(func.to_tsvector(simple, VersionRow.search_text).op("@@")(wanted))
        order = VersionRow.id + 0  # which keeps the planner from a walk that makes each row's words anew
    if query.tag is not None:
        statement = statement.join(VersionTagRow, VersionTagRow.version_id == VersionRow.id)
        statement = statement.where(VersionTagRow.tag == query.tag)
    if query.namespace is not None:
        statement = statement.join(AdapterRow, AdapterRow.id == VersionRow.adapter_id)
        statement = statement.where(AdapterRow.namespace == query.namespace)
    equal = ((VersionRow.kind, query.kind), (VersionRow.rank, query.rank), (VersionRow.task, query.task))
    for attribute, value in equal:
        if value is not None:
            statement = statement.where(attribute == value)
    if query.license is not None:
        statement = statement.where(func.lower(VersionRow.license) == query.license.lower())
    if before is not None:
        statement = statement.where(order < before)
    return statement.order_by(order.desc()).limit(limit)

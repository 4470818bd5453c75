"""Finding adapters by words and properties, newest first.

Words alone are looked up in the text index of the database (SQLite: FTS5, PostgreSQL: GIN). With a base, the versions
of that base are read and their words compared: they are few, and the text index would first give all that hold the
words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, Select, column, func, literal_column, select, table
from sqlalchemy.orm import selectinload

from composer.errors import UsageError
from registry.db import session_scope
from registry.models import AdapterRow, VersionRow, VersionTagRow
from registry.schemas import Page, VersionInfo
from registry.services.catalogue import find_base, version_infos
from registry.words import query_words

__all__ = ["Query", "Search", "search_page"]

MAX_PAGE = 1000
MAX_WORDS = 20
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
            statement = search_page(
                self._engine.dialect.name, query, words, base, limit + 1, int(cursor) if cursor else None
            )
            rows = session.scalars(statement.options(selectinload(VersionRow.files))).all()
            items = tuple(version_infos(session, rows[:limit]))
        return Page(items=items, next=str(rows[limit - 1].id) if len(rows) > limit else None)


def search_page(
    dialect: str, query: Query, words: tuple[str, ...], base: str | None, limit: int, before: int | None
) -> Select[tuple[VersionRow]]:
    """The statement of one page. `base`: the fingerprint that query.base names."""
    statement = select(VersionRow).where(VersionRow.latest)
    order: Any = VersionRow.id
    if base is not None:
        statement = statement.where(VersionRow.base_fingerprint == base)
    if words and base is not None:
        for word in words:
            statement = statement.where(VersionRow.search_text.like(f"% {word}%"))
    elif words and dialect == "sqlite":
        wanted = " ".join(f'"{word}"*' for word in words)
        statement = statement.join(TEXT, TEXT.c.rowid == VersionRow.id)
        statement = statement.where(TEXT.c.version_text.op("MATCH")(wanted))
        order = TEXT.c.rowid  # in whose order the index gives its rows, so that a page needs no sort
    elif words:
        simple = literal_column("'simple'")
        wanted = func.to_tsquery(simple, " & ".join(f"{word}:*" for word in words))
        statement = statement.where(func.to_tsvector(simple, VersionRow.search_text).op("@@")(wanted))
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

"""Repositories as a listing, each with the tags that filters are compared with.

    by name         adapters, then bases
    by downloads    adapters, the most downloaded first, then bases, whose downloads are not counted
    by date         adapters and bases as one, the newest first: created, or last changed by a new latest version

A page goes on after the one that the page before ended with, so its cost does not grow with how far one has read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from heapq import merge
from typing import Any

from sqlalchemy import ColumnElement, Engine, Select, false, func, select, true, tuple_
from sqlalchemy.orm import Session, selectinload

from composer.errors import UsageError
from registry.db import session_scope
from registry.models import AdapterRow, BaseModelRow, VersionRow, VersionTagRow
from registry.names import adapter_name
from registry.schemas import BaseInfo, VersionInfo
from registry.services.catalogue import base_info, version_infos

__all__ = ["Listed", "Listing", "Order", "Query"]

BATCH = 200
ADAPTER_BASE = "base_model:adapter:"
BASE = "base_model:"
BASE_HASH = "base_hash:"
EVERY_ADAPTER = frozenset({"peft", "safetensors"})

Noun = VersionInfo | BaseInfo


class Order(StrEnum):
    """What comes first."""

    NAME = "name"
    DOWNLOADS = "downloads"
    CREATED = "created"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for: every tag, in the author's namespace, with these words in the name."""

    tags: tuple[str, ...] = ()
    author: str | None = None
    search: str | None = None
    order: Order = Order.NAME


@dataclass(frozen=True, slots=True)
class Listed:
    """A repository of a listing, how often it was downloaded, and the cursor to go on behind it."""

    noun: Noun
    downloads: int
    cursor: str


class Listing:
    """Reads adapters and bases as one list."""

    def __init__(self, engine: Engine, tags_of: Callable[[Noun], Sequence[str]]) -> None:
        self._engine = engine
        self._tags_of = tags_of

    def page(self, query: Query, limit: int, cursor: str | None) -> tuple[list[Listed], str | None]:
        """Up to `limit` repositories after `cursor`, and the cursor of the next page.

        Raises UsageError for a cursor that is none of this order.
        """
        wanted, found = set(query.tags), list[Listed]()
        with session_scope(self._engine) as session:
            for item in _repositories(session, query, limit, cursor):
                if wanted <= set(self._tags_of(item.noun)):
                    if len(found) == limit:
                        return found, found[-1].cursor
                    found.append(item)
        return found, None


def _repositories(session: Session, query: Query, limit: int, cursor: str | None) -> Iterator[Listed]:
    batch = min(limit + 1, BATCH)
    if query.order in (Order.CREATED, Order.CHANGED):
        yield from _by_date(session, query, batch, cursor)
        return
    kind, _, after = (cursor or "adapter:").partition(":")
    if kind not in ("adapter", "base"):
        raise _bad_cursor(cursor)
    if kind == "adapter":
        yield from (_by_name if query.order is Order.NAME else _by_downloads)(session, query, batch, after)
        after = ""
    for row in _walk_bases(session, query, BaseModelRow.name, batch, after or None):
        yield Listed(base_info(row, 0), 0, f"base:{row.name}")


def _by_name(session: Session, query: Query, batch: int, after: str) -> Iterator[Listed]:
    columns, place = (AdapterRow.namespace, AdapterRow.name), adapter_name(after) if after else None
    for adapter, _, info in _walk(session, query, columns, batch, place):
        yield Listed(info, adapter.downloads, f"adapter:{info.name}")


def _by_downloads(session: Session, query: Query, batch: int, after: str) -> Iterator[Listed]:
    columns, place = (AdapterRow.downloads, AdapterRow.id), _numbers(after) if after else None
    for adapter, _, info in _walk(session, query, columns, batch, place, newest=True):
        yield Listed(info, adapter.downloads, f"adapter:{adapter.downloads}.{adapter.id}")


def _by_date(session: Session, query: Query, batch: int, cursor: str | None) -> Iterator[Listed]:
    """Two walks by number, which follows time, merged by time; the cursor is the place in both, 0 for the start."""
    kind, _, after = (cursor or "date:0.0").partition(":")
    if kind != "date":
        raise _bad_cursor(cursor)
    seen, seen_base = _numbers(after)
    changed = query.order is Order.CHANGED
    columns = (VersionRow.id,) if changed else (AdapterRow.id,)
    adapters = (
        (row.created_at if changed else adapter.created_at, row.id if changed else adapter.id, adapter, info)
        for adapter, row, info in _walk(session, query, columns, batch, (seen,) if seen else None, newest=True)
    )
    bases = (
        (row.created_at, row.id, None, base_info(row, 0))
        for row in _walk_bases(session, query, BaseModelRow.id, batch, seen_base or None, newest=True)
    )
    for _, number, adapter, noun in merge(adapters, bases, key=lambda item: item[0], reverse=True):
        seen, seen_base = (number, seen_base) if adapter else (seen, number)
        yield Listed(noun, adapter.downloads if adapter else 0, f"date:{seen}.{seen_base}")


def _walk(
    session: Session, query: Query, columns: tuple[Any, ...], batch: int, place: Any, *, newest: bool = False
) -> Iterator[tuple[AdapterRow, VersionRow, VersionInfo]]:
    """Adapters that may have the tags, with their latest versions, in the order of `columns` from behind `place` on."""
    key = tuple_(*columns)
    order = [column.desc() if newest else column for column in columns]
    rows = _adapters(session, query).order_by(*order).limit(batch).options(selectinload(VersionRow.files))
    while True:
        after = None if place is None else tuple_(*place)
        page = rows if after is None else rows.where(key < after if newest else key > after)
        found = list(session.execute(page).tuples())
        infos = version_infos(session, [row for _, row in found])
        yield from ((adapter, row, info) for (adapter, row), info in zip(found, infos, strict=True))
        if len(found) < batch:
            return
        place = [getattr(found[-1][0 if column.class_ is AdapterRow else 1], column.key) for column in columns]


def _adapters(session: Session, query: Query) -> Select[tuple[AdapterRow, VersionRow]]:
    rows = select(AdapterRow, VersionRow).join(VersionRow, VersionRow.adapter_id == AdapterRow.id)
    rows = rows.where(VersionRow.latest)
    if query.author:
        rows = rows.where(AdapterRow.namespace == query.author)
    if query.search:
        name = AdapterRow.namespace + "/" + AdapterRow.name
        rows = rows.where(func.lower(name).contains(query.search.lower(), autoescape=True))
    for tag in query.tags:
        rows = rows.where(_tagged(session, tag))
    return rows


def _tagged(session: Session, tag: str) -> ColumnElement[bool]:
    """Versions that may have a tag: on the base that it names, of the property that it states, or with it on a card."""
    prefix, _, value = tag.partition(":")
    if tag in EVERY_ADAPTER:
        return true()
    if prefix == "hash":
        return false()
    if tag.startswith(BASE_HASH):
        return VersionRow.base_fingerprint == value
    if tag.startswith(BASE):
        name = tag.removeprefix(ADAPTER_BASE).removeprefix(BASE)
        fingerprint = session.scalar(select(BaseModelRow.fingerprint).where(BaseModelRow.name == name))
        named = VersionRow.base_name == name
        return named | (VersionRow.base_fingerprint == fingerprint) if fingerprint else named
    labelled = VersionRow.id.in_(select(VersionTagRow.version_id).where(VersionTagRow.tag == tag))
    if prefix == "kind":
        return labelled | (VersionRow.kind == value)
    if prefix == "license":
        return labelled | (func.lower(VersionRow.license) == value)
    return labelled


def _walk_bases(
    session: Session, query: Query, column: Any, batch: int, place: Any, *, newest: bool = False
) -> Iterator[BaseModelRow]:
    if any(tag.startswith((ADAPTER_BASE, BASE_HASH)) for tag in query.tags):
        return
    rows = select(BaseModelRow).order_by(column.desc() if newest else column).limit(batch)
    if query.author:
        rows = rows.where(BaseModelRow.name.startswith(f"{query.author}/", autoescape=True))
    if query.search:
        rows = rows.where(func.lower(BaseModelRow.name).contains(query.search.lower(), autoescape=True))
    while True:
        page = rows if place is None else rows.where(column < place if newest else column > place)
        found = list(session.scalars(page))
        yield from found
        if len(found) < batch:
            return
        place = getattr(found[-1], column.key)


def _numbers(text: str) -> tuple[int, int]:
    """Two numbers of a cursor."""
    first, _, second = text.partition(".")
    if not all(part.isascii() and part.isdecimal() and len(part) < 19 for part in (first, second)):
        raise _bad_cursor(text)
    return int(first), int(second)


def _bad_cursor(cursor: str | None) -> UsageError:
    return UsageError("the cursor is none of this order", expected="the one of the page before", found=cursor)

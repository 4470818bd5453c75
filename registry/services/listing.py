"""Repositories as a listing: adapters by name, then bases by name, each with the tags that filters are compared with.

A page goes on after the name that the one before ended with, so its cost does not grow with how far one has read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Engine, exists, func, select, tuple_
from sqlalchemy.orm import Session

from composer.errors import UsageError
from registry.db import session_scope
from registry.models import AdapterRow, BaseModelRow, VersionRow
from registry.names import adapter_name
from registry.schemas import BaseInfo, VersionInfo
from registry.services.catalogue import base_info, version_info

__all__ = ["Listing", "Query"]

BATCH = 200
ADAPTER_BASE = "base_model:adapter:"
BASE = "base_model:"
BASE_HASH = "base_hash:"

Noun = VersionInfo | BaseInfo


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for: every tag, in the author's namespace, with these words in the name."""

    tags: tuple[str, ...] = ()
    author: str | None = None
    search: str | None = None


class Listing:
    """Reads adapters and bases as one list."""

    def __init__(self, engine: Engine, tags_of: Callable[[Noun], Sequence[str]]) -> None:
        self._engine = engine
        self._tags_of = tags_of

    def page(self, query: Query, limit: int, cursor: str | None) -> tuple[list[Noun], str | None]:
        """Up to `limit` nouns after `cursor`, and the cursor of the next page. Raises UsageError for a bad cursor."""
        kind, _, after = (cursor or "adapter:").partition(":")
        if kind not in ("adapter", "base"):
            raise UsageError("the cursor is none of ours", expected="the one of the page before", found=cursor)
        wanted = set(query.tags)
        found: list[Noun] = []
        with session_scope(self._engine) as session:
            for noun in self._nouns(session, query, kind, after):
                if wanted <= set(self._tags_of(noun)):
                    if len(found) == limit:
                        last = found[-1]
                        return found, f"{'adapter' if isinstance(last, VersionInfo) else 'base'}:{last.name}"
                    found.append(noun)
        return found, None

    @staticmethod
    def _nouns(session: Session, query: Query, kind: str, after: str) -> Iterator[Noun]:
        if kind == "adapter":
            yield from _adapters(session, query, after)
            after = ""
        yield from _bases(session, query, after)


def _adapters(session: Session, query: Query, after: str) -> Iterator[VersionInfo]:
    """The latest version of each adapter that may have the tags."""
    rows = select(AdapterRow).order_by(AdapterRow.namespace, AdapterRow.name).limit(BATCH)
    if query.author:
        rows = rows.where(AdapterRow.namespace == query.author)
    if query.search:
        name = AdapterRow.namespace + "/" + AdapterRow.name
        rows = rows.where(func.lower(name).contains(query.search.lower(), autoescape=True))
    for tag in query.tags:
        if tag.startswith((ADAPTER_BASE, BASE_HASH)):
            rows = rows.where(exists().where(VersionRow.adapter_id == AdapterRow.id, _trained_on(session, tag)))
    while True:
        page = (
            rows.where(tuple_(AdapterRow.namespace, AdapterRow.name) > tuple_(*adapter_name(after))) if after else rows
        )
        batch = list(session.scalars(page))
        for adapter in batch:
            latest = session.scalar(select(VersionRow).where(VersionRow.adapter_id == adapter.id, VersionRow.latest))
            if latest is not None:
                yield version_info(session, latest)
        if len(batch) < BATCH:
            return
        after = batch[-1].full_name


def _trained_on(session: Session, tag: str) -> ColumnElement[bool]:
    """Versions on the base of a tag: by its fingerprint, or by a name where they have no more."""
    if tag.startswith(BASE_HASH):
        return VersionRow.base_fingerprint == tag.removeprefix(BASE_HASH)
    name = tag.removeprefix(ADAPTER_BASE)
    fingerprint = session.scalar(select(BaseModelRow.fingerprint).where(BaseModelRow.name == name))
    known = VersionRow.base_fingerprint == fingerprint
    return known | (VersionRow.base_name == name) if fingerprint else VersionRow.base_name == name


def _bases(session: Session, query: Query, after: str) -> Iterator[BaseInfo]:
    if any(tag.startswith((ADAPTER_BASE, BASE_HASH)) for tag in query.tags):
        return
    rows = select(BaseModelRow).order_by(BaseModelRow.name).limit(BATCH)
    if query.author:
        rows = rows.where(BaseModelRow.name.startswith(f"{query.author}/", autoescape=True))
    if query.search:
        rows = rows.where(func.lower(BaseModelRow.name).contains(query.search.lower(), autoescape=True))
    while True:
        batch = list(session.scalars(rows.where(BaseModelRow.name > after) if after else rows))
        for row in batch:
            yield base_info(row, 0)
        if len(batch) < BATCH:
            return
        after = batch[-1].name

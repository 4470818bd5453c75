"""Listings that come in pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

if TYPE_CHECKING:
    from registry.schemas import Page

__all__ = ["collect", "limit_option"]

T_co = TypeVar("T_co", covariant=True)
PAGE = 500

limit_option = click.option("--limit", type=click.IntRange(min=1), help="At most so many; default: all.")


class Lister(Protocol[T_co]):
    """A method of the registry that gives one page."""

    def __call__(self, *, limit: int = ..., cursor: str | None = ...) -> Page[Any]:
        """The page after `cursor`."""
        ...


def collect(lister: Lister[Any], limit: int | None) -> list[Any]:
    """All items of all pages, or the first `limit`."""
    items: list[Any] = []
    cursor: str | None = None
    while limit is None or len(items) < limit:
        page = lister(limit=PAGE if limit is None else min(PAGE, limit - len(items)), cursor=cursor)
        items.extend(page.items)
        cursor = page.next
        if cursor is None:
            break
    return items

"""What a search matches: words, lower case, without signs; a word of a query matches words that begin with it."""

from __future__ import annotations

import re

__all__ = ["index_text", "query_words"]

WORD = re.compile(r"[^\W_]+")


def index_text(*parts: str) -> str:
    """The words of the parts, each with a space before it, so that ``LIKE '% shout%'`` finds a beginning."""
    return "".join(f" {word}" for word in WORD.findall(" ".join(parts).lower()))


def query_words(text: str) -> tuple[str, ...]:
    """The words of a query; none where it holds only signs."""
    return tuple(WORD.findall(text.lower()))

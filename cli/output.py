"""Printing: data on stdout as people, programs or scripts want it.

human   tables and blocks, written by hand; warnings and advice on stderr
json    the schema as it is
quiet   the identifying value, one a line
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cli.options import Settings

__all__ = ["block", "clean", "emit", "short", "size", "table"]

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
DIGEST_DIGITS = 12
NUMBER = re.compile(r"-?[0-9][0-9,]*(\.[0-9]+)?(%| B| [KMGT]iB|×)?")


def emit(
    settings: Settings,
    value: Any,
    human: Callable[[], str],
    quiet: Callable[[], str | Iterable[str]],
    warnings: Sequence[str] = (),
) -> None:
    """Print `value` in the format that was asked for: a schema, a list of schemas or plain JSON.

    Warnings and the value's own advice go to stderr, for people; programs read them in the value.
    """
    if settings.format == "json":
        click.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False))
        return
    if settings.format == "quiet":
        lines = quiet()
        for line in [lines] if isinstance(lines, str) else lines:
            click.echo(clean(line))
        return
    text = human()
    if text:
        click.echo(text)
    for warning in warnings:
        click.echo(f"warning: {clean(warning)}", err=True)
    for advice in getattr(value, "advice", ()):
        click.echo(f"advice: {clean(str(advice))}", err=True)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def clean(text: str) -> str:
    """`text` without control characters: what others wrote must not steer the terminal."""
    return "".join(character if character.isprintable() else "�" for character in text)


def size(count: int) -> str:
    """Bytes as people read them: 134.5 MiB."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {UNITS[unit]}"


def short(digest: str | None) -> str:
    """The scheme and the first digits of a digest; tables have no room for all."""
    if not digest:
        return "-"
    scheme, colon, digits = digest.rpartition(":")
    return f"{scheme}{colon}{digits[:DIGEST_DIGITS]}"


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], empty: str) -> str:
    """Aligned columns under headers; `empty` when there are no rows. Columns of numbers are flush right."""
    cells = [[clean("-" if cell is None or cell == "" else str(cell)) for cell in row] for row in rows]
    if not cells:
        return empty
    widths = [max(len(line[index]) for line in [list(headers), *cells]) for index in range(len(headers))]
    right = [all(_is_number(row[index]) for row in cells) for index in range(len(headers))]
    lines = []
    for line in [list(headers), *cells]:
        padded = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell == "-" or NUMBER.fullmatch(cell) is not None


def block(pairs: Iterable[tuple[str, Any]]) -> str:
    """Names and values, aligned; pairs without a value are left out, a list takes one line an item."""
    kept = [(name, value) for name, value in pairs if value not in (None, "", (), [])]
    width = max((len(name) for name, _ in kept), default=0) + 2
    lines = []
    for name, value in kept:
        items = value if isinstance(value, list | tuple) else [value]
        for index, item in enumerate(items):
            lines.append(f"{name if index == 0 else '':<{width}}{clean(str(item))}")
    return "\n".join(lines)

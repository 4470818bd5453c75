"""docs/security.md and docs/faults.md: each promise has a test, and each test that they name is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "security.md"
LINK = re.compile(r"\[`(test_\w+)`\]\(([^)]+)\)")
PROMISES = ("Access", "Names", "Strangers' files", "Stored bytes", "Faults", "Provenance", "Screening")


def sections() -> dict[str, list[str]]:
    """The promises under each heading."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {
        title: re.split(r"^- ", text, flags=re.MULTILINE)[1:]
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


@cache
def functions_of(path: Path) -> frozenset[str]:
    """The functions of a test file, by its syntax."""
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize(("page", "least"), [(PAGE, 40), (PAGE.with_name("faults.md"), 20)])
def test_each_link_leads_to_a_test(page: Path, least: int) -> None:
    """The file is there, and the function in it."""
    links = LINK.findall(page.read_text())
    assert len(links) > least
    gone = [
        f"{path}::{name}"
        for name, path in links
        if not (file := page.parent / path).is_file() or name not in functions_of(file)
    ]
    assert gone == []


@pytest.mark.parametrize("title", PROMISES)
def test_each_promise_has_a_test(title: str) -> None:
    """No sentence of these sections stands without one."""
    promises = sections()[title]
    assert promises
    assert [text.partition("\n")[0] for text in promises if not LINK.search(text)] == []

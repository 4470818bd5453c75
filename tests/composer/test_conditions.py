"""Conditions on sizes: what they say, and of which weight."""

from __future__ import annotations

import pytest

from composer.adapters import ANY_SIZE, Target
from composer.conditions import holds, turned


@pytest.mark.parametrize(
    ("condition", "fits", "fails"),
    [
        ("columns <= 5", (9, 5), (5, 9)),
        ("rows = 3", (3, 7), (7, 3)),
        ("smaller = 3", (8, 3), (8, 4)),
        ("larger >= 8", (3, 8), (7, 7)),
        ("sum = 10", (4, 6), (5, 6)),
        ("product >= 12", (3, 4), (11, 1)),
        ("rows multiple of 4", (8, 3), (6, 4)),
    ],
)
def test_a_condition_is_about_rows_and_columns(condition: str, fits: tuple[int, int], fails: tuple[int, int]) -> None:
    """It holds for the one and not for the other, and the other way round on transposed weights."""
    assert holds(condition, fits)
    assert not holds(condition, fails)
    assert holds(turned(condition), fits[::-1])
    assert not holds(turned(condition), fails[::-1])


def test_a_vector_meets_no_condition() -> None:
    """Only a matrix has rows and columns."""
    assert not holds("columns <= 5", (5,))


@pytest.mark.parametrize("text", ["columns", "depth <= 5", "columns < 5", "columns <= -5", ""])
def test_another_text_is_an_error(text: str) -> None:
    """A catalogue that holds something else is not read as if it held nothing."""
    with pytest.raises(ValueError, match="not a condition"):
        holds(text, (4, 4))


def test_what_a_catalogue_keeps_of_a_target_gives_the_target() -> None:
    """Sizes, then conditions, through JSON's own types."""
    target = Target("a.weight", (ANY_SIZE, 4), ("rows <= 8", "sum = 10"))
    assert target.needs == (-1, 4, "rows <= 8", "sum = 10")
    assert Target.of("a.weight", list(target.needs)) == target
    assert target.fits((6, 4))
    assert not target.fits((8, 4))

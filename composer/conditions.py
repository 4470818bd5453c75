"""What an adapter asks of the sizes of a weight where it does not know the sizes themselves: `columns <= 64`.

A condition is a text, so that a catalogue keeps it beside the sizes: a measure of [rows, columns], a relation and a
number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

__all__ = ["holds", "turned"]

CONDITION = re.compile(r"(?P<measure>[a-z]+) (?P<relation><=|>=|=|multiple of) (?P<number>\d+)")
MEASURES: Mapping[str, Callable[[int, int], int]] = {
    "rows": lambda rows, columns: rows,
    "columns": lambda rows, columns: columns,
    "smaller": min,
    "larger": max,
    "sum": lambda rows, columns: rows + columns,
    "product": lambda rows, columns: rows * columns,
}
RELATIONS: Mapping[str, Callable[[int, int], bool]] = {
    "=": lambda found, number: found == number,
    "<=": lambda found, number: found <= number,
    ">=": lambda found, number: found >= number,
    "multiple of": lambda found, number: found % number == 0,
}
TURNED = {"rows": "columns", "columns": "rows"}


def holds(condition: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape meets the condition; one without exactly two sizes does not.

    Raises ValueError for a text that is no condition.
    """
    match = CONDITION.fullmatch(condition)
    if match is None or match["measure"] not in MEASURES:
        raise ValueError(f"{condition!r} is not a condition on sizes")
    if len(shape) != 2:
        return False
    rows, columns = shape
    return RELATIONS[match["relation"]](MEASURES[match["measure"]](rows, columns), int(match["number"]))


def turned(condition: str) -> str:
    """The same condition on the transposed weight."""
    measure, _, rest = condition.partition(" ")
    return f"{TURNED.get(measure, measure)} {rest}"

"""Names that people take for one another: equal skeletons, and names one slip of a finger apart.

Names are letters, digits and . _ - of ASCII (registry.names), so letters of other scripts that look like Latin ones
cannot be used at all; what is left is told apart here. A skeleton is the name in small letters, without separators,
with 0 for o, 1 for i and l, m for rn and w for vv. Sources: Unicode TR 39 §4 (confusables), and the package index of
Python, which compares new projects by such a form.
"""

from __future__ import annotations

import re

__all__ = ["near", "skeleton"]

SEPARATORS = re.compile(r"[._-]+")
LOOK_ALIKE = (("rn", "m"), ("vv", "w"), ("o", "0"), ("i", "1"), ("l", "1"))
MIN_LENGTH = 4  # of names that one slip makes alike; shorter ones are one slip from everything


def skeleton(name: str) -> str:
    """What is left of a name for who reads it quickly: ``Team_A`` and ``team-a`` give the same."""
    text = SEPARATORS.sub("", name.lower())
    for seen, taken_for in LOOK_ALIKE:
        text = text.replace(seen, taken_for)
    return text


def near(one: str, other: str) -> bool:
    """Whether two different names have equal skeletons, or skeletons that one slip makes equal.

    A slip is a letter more, less, other, or two swapped.
    """
    if one == other:
        return False
    a, b = sorted((skeleton(one), skeleton(other)), key=len)
    if a == b:
        return True
    if len(a) < MIN_LENGTH or len(b) - len(a) > 1:
        return False
    start = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), len(a))
    if len(a) < len(b):
        return a[start:] == b[start + 1 :]
    swapped = a[start : start + 2] == b[start : start + 2][::-1] and a[start + 2 :] == b[start + 2 :]
    return swapped or a[start + 1 :] == b[start + 1 :]

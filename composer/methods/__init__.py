"""Ways to combine deltas, one file each.

    @merge_method
    def linear(deltas, weights): …      float32 blocks in product space -> one float32 block

Siblings are imported in sorted order; a duplicate name is an error. A method's docstring is its documentation.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from composer.errors import RecipeError

__all__ = ["MergeMethod", "find_method", "merge_method", "methods"]

MergeMethod: TypeAlias = Callable[[Sequence[np.ndarray], Sequence[float]], np.ndarray]

_METHODS: dict[str, MergeMethod] = {}


def merge_method(function: MergeMethod) -> MergeMethod:
    """Register a method under its function's name, which must be new."""
    if function.__name__ in _METHODS:
        raise RuntimeError(f"two merge methods are named {function.__name__!r}")
    _METHODS[function.__name__] = function
    return function


def methods() -> dict[str, MergeMethod]:
    """All methods by name."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        importlib.import_module(f"{__name__}.{module.name}")
    return _METHODS


def find_method(name: str) -> MergeMethod:
    """The method of that name. Raises RecipeError listing the known ones."""
    known = methods()
    if name not in known:
        raise RecipeError(
            f"unknown merge method {name!r}",
            expected=sorted(known),
            found=name,
            remedy=f"use {' or '.join(sorted(known))}",
        )
    return known[name]

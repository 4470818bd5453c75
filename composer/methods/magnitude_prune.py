"""Trim, sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.methods import Range, merge_method
from composer.sparsity import keep_largest, weighted_sum

__all__ = ["magnitude_prune"]


@merge_method(whole=True)
def magnitude_prune(
    deltas: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    density: Annotated[float, Range(0, 1, above=True)] = 0.5,
) -> np.ndarray:
    """Keep the ⌊density·n⌋ largest of each delta's n numbers by magnitude, and sum.

    deltas: float32 [rows, columns], not changed. Returns float32.
    Source: PEFT's magnitude_prune (peft/utils/merge_utils.py), in product space.
    """
    return weighted_sum([keep_largest(delta, density) for delta in deltas], weights)

"""Leave out outliers and small numbers, sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.methods import Range, merge_method
from composer.sparsity import keep_largest, weighted_sum

__all__ = ["breadcrumbs"]


@merge_method(whole=True)
def breadcrumbs(
    deltas: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    density: Annotated[float, Range(0, 1, above=True)] = 0.9,
    gamma: Annotated[float, Range(0, 1)] = 0.01,
) -> np.ndarray:
    """Leave out each delta's ⌊gamma·n⌋ largest of n numbers, keep the ⌊density·n⌋ next by magnitude, and sum.

    deltas: float32 [rows, columns], not changed. Returns float32.
    Source: arXiv:2312.06795 §3: β, the share of small numbers masked, is 1 - gamma - density.
    """
    masked = [keep_largest(delta, density, skip=int(gamma * delta.size)) for delta in deltas]
    return weighted_sum(masked, weights)

"""Drop at random, rescale, sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.methods import Range, merge_method
from composer.sparsity import drop, weighted_sum

__all__ = ["dare_linear"]


@merge_method
def dare_linear(
    deltas: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    rng: Sequence[np.random.Generator],
    density: Annotated[float, Range(0, 1, above=True)] = 0.5,
) -> np.ndarray:
    """Keep each number with probability `density`, divide it by that, and sum: the expected value is `linear`'s.

    deltas: float32 blocks [rows, columns], not changed. rng: one generator a delta. Returns float32.
    Source: arXiv:2311.03099 §3.1; `density` is 1 - p.
    """
    return weighted_sum([drop(delta, density, each) for delta, each in zip(deltas, rng, strict=True)], weights)

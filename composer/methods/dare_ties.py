"""Drop at random, rescale, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.methods import Range, merge_method
from composer.sparsity import drop, merge_agreeing

__all__ = ["dare_ties"]


@merge_method
def dare_ties(
    deltas: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    rng: Sequence[np.random.Generator],
    density: Annotated[float, Range(0, 1, above=True)] = 0.5,
    scaling: Annotated[float, Range(-100, 100)] = 1.0,
) -> np.ndarray:
    """DARE's random drop in place of the trimming of `ties`, then the election and mean of `ties`.

    deltas: float32 blocks [rows, columns], not changed. rng: one generator a delta. Returns float32.
    Source: arXiv:2311.03099 §3.2
    """
    kept = [drop(delta, density, each) for delta, each in zip(deltas, rng, strict=True)]
    return merge_agreeing(kept, weights) * np.float32(scaling)

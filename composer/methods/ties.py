"""Trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.methods import Range, merge_method
from composer.sparsity import keep_largest, merge_agreeing

__all__ = ["ties"]


@merge_method(whole=True)
def ties(
    deltas: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    density: Annotated[float, Range(0, 1, above=True)] = 0.2,
    scaling: Annotated[float, Range(-100, 100)] = 1.0,
) -> np.ndarray:
    """Trim each delta to its largest numbers, elect a sign for each number, average the deltas that agree.

    Each delta keeps ⌊density·n⌋ of the tensor's n numbers. Weights multiply after trimming and before the election,
    and the mean divides by how many agree, not by their weights. At weights of 1 it is the paper's formula with
    λ = `scaling`; an adapter alone gives w·λ times its trimmed delta.
    deltas: float32 [rows, columns], not changed. Returns float32; 0 where nothing agrees.
    Source: arXiv:2306.01708 §3
    """
    return merge_agreeing([keep_largest(delta, density) for delta in deltas], weights) * np.float32(scaling)

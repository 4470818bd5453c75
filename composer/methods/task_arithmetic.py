"""The weighted sum, scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.methods import Range, merge_method
from composer.sparsity import weighted_sum

__all__ = ["task_arithmetic"]


@merge_method
def task_arithmetic(
    deltas: Sequence[np.ndarray], weights: Sequence[float], *, scaling: Annotated[float, Range(-100, 100)] = 1.0
) -> np.ndarray:
    """λ·Σ wᵢ·Δᵢ: `linear` with one more factor, `scaling`.

    deltas: float32 blocks [rows, columns], not changed. Returns float32 of that shape.
    Source: arXiv:2212.04089 §2
    """
    return weighted_sum(deltas, weights) * np.float32(scaling)

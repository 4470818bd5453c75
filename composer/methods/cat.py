"""The sum that concatenated factors stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from composer.methods import merge_method
from composer.sparsity import weighted_sum

__all__ = ["cat"]


@merge_method
def cat(deltas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Σ wᵢ·Δᵢ: what PEFT's `cat` computes by stacking all A and all B; the same numbers as `linear`.

    deltas: float32 blocks [rows, columns], not changed. Returns float32.
    Source: PEFT's add_weighted_adapter
    """
    return weighted_sum(deltas, weights)

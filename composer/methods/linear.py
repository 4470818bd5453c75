"""The weighted sum of deltas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from composer.methods import merge_method

__all__ = ["linear"]


@merge_method
def linear(deltas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Σ wᵢ·Δᵢ, the true sum in product space.

    deltas: one or more float32 blocks [rows, columns], already scaled, not to be changed. weights: one a delta.
    Returns float32 of the same shape. PEFT's `linear` sums A and B apart instead, which adds cross terms.
    """
    total = deltas[0] * np.float32(weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total += delta * np.float32(weight)
    return total

"""The mean, drawn to the base by how far the deltas disagree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from composer.methods import merge_method
from composer.sparsity import weighted_sum

__all__ = ["model_stock"]


@merge_method(whole=True)
def model_stock(deltas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """t·mean(wᵢ·Δᵢ) with t = k·cos θ / (1 + (k-1)·cos θ), θ the angle between deltas, for each tensor.

    cos θ is the mean over all pairs of the k weighted deltas, and not below 0. One delta alone is kept as it is.
    deltas: float32 [rows, columns], not changed. Returns float32.
    Source: arXiv:2403.19522 §4, eq. 5 (the base is the anchor)
    """
    k = len(deltas)
    if k == 1:
        return weighted_sum(deltas, weights)
    scaled = [delta.astype(np.float64) * weight for delta, weight in zip(deltas, weights, strict=True)]
    norms = [np.sqrt((delta * delta).sum()) for delta in scaled]
    pairs = [(i, j) for i in range(k) for j in range(i)]
    cosines = [
        (scaled[i] * scaled[j]).sum() / norms[i] / norms[j] if norms[i] * norms[j] > 0 else 0.0 for i, j in pairs
    ]
    cosine = max(0.0, float(np.mean(cosines)))
    ratio = k * cosine / (1 + (k - 1) * cosine)
    return (sum(scaled) * (ratio / k)).astype(np.float32)

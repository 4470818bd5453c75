"""The sum with equal singular values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.deltas import LoadedLowRank
from composer.factors import float32_pair, stacked, thin_svd
from composer.methods import Range, merge_method

__all__ = ["iso_c"]


@merge_method(factors=True)
def iso_c(
    deltas: Sequence[LoadedLowRank], weights: Sequence[float], *, scaling: Annotated[float, Range(-100, 100)] = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """λ·σ̄·U·Vᵀ of the sum U·Σ·Vᵀ = Σ wᵢ·Δᵢ: every direction weighs the mean singular value σ̄.

    The paper averages over the full rank of a matrix; a sum of low-rank deltas has no direction beyond its own rank,
    so the mean goes over that. One adapter does not give its own delta, its spectrum is flattened as well.
    deltas: loaded low-rank deltas. Returns (left, right), float32 [rows, k] and [k, columns].
    Source: arXiv:2502.04959 §4.1 (Iso-C)
    """
    u, s, v = thin_svd(*stacked(deltas, weights))
    mean = s.mean() if s.size else 0.0
    return float32_pair(u * (scaling * mean), v)

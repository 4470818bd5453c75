"""The sum at a lower rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.deltas import LoadedLowRank
from composer.factors import float32_pair, stacked, thin_svd
from composer.methods import Range, merge_method

__all__ = ["svd"]


@merge_method(factors=True)
def svd(
    deltas: Sequence[LoadedLowRank], weights: Sequence[float], *, rank: Annotated[int, Range(0, 1 << 16)] = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The best approximation of Σ wᵢ·Δᵢ at `rank`; 0 stands for the largest rank among the tensor's adapters.

    Best in the Frobenius norm (Eckart, Young 1936); computed from QR cores in float64, never from the dense matrix.
    deltas: loaded low-rank deltas. Returns (left, right), float32 [rows, k] and [k, columns] with k up to `rank`.
    Source: PEFT's `svd` without clamping
    """
    u, s, v = thin_svd(*stacked(deltas, weights))
    k = rank or max(delta.right.shape[0] for delta in deltas)
    return float32_pair(u[:, :k] * s[:k], v[:k])

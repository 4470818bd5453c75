"""TIES in a common left basis of low-rank deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.deltas import LoadedLowRank
from composer.factors import float32_pair, thin_svd
from composer.methods import Range, merge_method
from composer.sparsity import keep_largest, merge_agreeing

__all__ = ["knots"]


@merge_method(factors=True)
def knots(
    deltas: Sequence[LoadedLowRank],
    weights: Sequence[float],
    *,
    density: Annotated[float, Range(0, 1, above=True)] = 0.2,
    scaling: Annotated[float, Range(-100, 100)] = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Write [Δ₁ … Δₖ] side by side as U·Σ·[V₁ … Vₖ]ᵀ, merge the Vᵢ with `ties`, and give U·Σ·V (KnOTS-TIES).

    Computed from QR cores in float64, never from the dense matrices.
    deltas: loaded low-rank deltas. Returns (left, right), float32 [rows, r] and [r, columns], r up to Σ rᵢ.
    Source: arXiv:2410.19735 §4
    """
    left = np.concatenate([delta.left.astype(np.float64) * float(delta.scale) for delta in deltas], axis=1)
    u, s, v = thin_svd(left, _block_diagonal([delta.right for delta in deltas]))
    parts = [keep_largest(part.astype(np.float32), density) for part in np.split(v, len(deltas), axis=1)]
    return float32_pair(u * (scaling * s), merge_agreeing(parts, weights))


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """[Σ rᵢ, k·columns] with each block [rᵢ, columns] in its own rows and columns."""
    columns, row = blocks[0].shape[1], 0
    out = np.zeros((sum(len(block) for block in blocks), len(blocks) * columns))
    for index, block in enumerate(blocks):
        out[row : row + len(block), index * columns : (index + 1) * columns] = block
        row += len(block)
    return out

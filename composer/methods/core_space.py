"""TIES in the common core of low-rank deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.deltas import LoadedLowRank
from composer.factors import float32_pair
from composer.methods import Range, merge_method
from composer.sparsity import keep_largest, merge_agreeing

__all__ = ["core_space"]


@merge_method(factors=True)
def core_space(
    deltas: Sequence[LoadedLowRank],
    weights: Sequence[float],
    *,
    density: Annotated[float, Range(0, 1, above=True)] = 0.2,
    scaling: Annotated[float, Range(-100, 100)] = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Write each delta as U·Mᵢ·Vᵀ in bases common to all, merge the small Mᵢ with `ties`, go back.

    U holds the left singular vectors of all B side by side, V those of all A; without trimming or conflicts nothing
    is lost. The scale of an adapter counts as part of its B.
    deltas: loaded low-rank deltas. Returns (left, right), float32 [rows, k] and [k, columns], k up to Σ rᵢ.
    Source: arXiv:2509.17786 §4 (Core Space with TIES)
    """
    lefts = [delta.left.astype(np.float64) * float(delta.scale) for delta in deltas]
    rights = [delta.right.astype(np.float64) for delta in deltas]
    u = np.linalg.svd(np.concatenate(lefts, axis=1), full_matrices=False)[0]
    v = np.linalg.svd(np.concatenate(rights), full_matrices=False)[2]
    cores = [(u.T @ left) @ (right @ v.T) for left, right in zip(lefts, rights, strict=True)]
    merged = merge_agreeing([keep_largest(core.astype(np.float32), density) for core in cores], weights)
    return float32_pair(u @ (merged.astype(np.float64) * scaling), v)

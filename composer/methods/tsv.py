"""Singular vectors of several deltas, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.deltas import LoadedLowRank
from composer.factors import float32_pair, stacked, thin_svd
from composer.methods import Range, merge_method

__all__ = ["tsv"]


@merge_method(factors=True)
def tsv(
    deltas: Sequence[LoadedLowRank], weights: Sequence[float], *, scaling: Annotated[float, Range(-100, 100)] = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """λ·U⊥·Σ·V⊥ᵀ: the leading singular vectors of each weighted delta, side by side, made orthogonal (TSV-M).

    Each of k deltas gives ⌊min(rows, columns)/k⌋ components, at least one; a LoRA seldom has more. U⊥ is the orthogonal
    matrix nearest to the stacked U (Procrustes), V⊥ likewise. One adapter gives its own delta.
    deltas: loaded low-rank deltas. Returns (left, right), float32.
    Source: arXiv:2412.00081 §3.2, Algorithm 1
    """
    parts = [thin_svd(*stacked([delta], [weight])) for delta, weight in zip(deltas, weights, strict=True)]
    rows, columns = deltas[0].left.shape[0], deltas[0].right.shape[1]
    count = max(1, min(rows, columns) // len(parts))
    u = np.concatenate([u[:, :count] for u, _, _ in parts], axis=1)
    s = np.concatenate([s[:count] for _, s, _ in parts])
    v = np.concatenate([v[:count] for _, _, v in parts])
    return float32_pair(_orthogonal(u) * (scaling * s), _orthogonal(v.T).T)


def _orthogonal(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right

"""Linear algebra on low-rank deltas that never forms the dense matrix: thin QR, then an SVD of the small core."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from composer.deltas import LoadedLowRank

__all__ = ["float32_pair", "stacked", "thin_svd"]

Svd = tuple[np.ndarray, np.ndarray, np.ndarray]


def stacked(deltas: Sequence[LoadedLowRank], weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Float64 left [rows, Σr] and right [Σr, columns] whose product is Σ wᵢ·Δᵢ."""
    scaled = [
        delta.left.astype(np.float64) * (float(delta.scale) * weight)
        for delta, weight in zip(deltas, weights, strict=True)
    ]
    return np.concatenate(scaled, axis=1), np.concatenate([delta.right.astype(np.float64) for delta in deltas])


def thin_svd(left: np.ndarray, right: np.ndarray) -> Svd:
    """u [rows, k], s [k], v [k, columns] of left·right, in float64, without directions that are numerically 0.

    left [rows, r], right [r, columns]. Costs O((rows + columns)·r²).
    """
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, v = np.linalg.svd(r_left @ r_right.T)
    k = int(np.count_nonzero(s > s[0] * max(left.shape[0], right.shape[1]) * np.finfo(np.float32).eps)) if s.size else 0
    return q_left @ u[:, :k], s[:k], v[:k] @ q_right.T


def float32_pair(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float32, C-contiguous."""
    return np.ascontiguousarray(left, np.float32), np.ascontiguousarray(right, np.float32)

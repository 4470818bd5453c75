"""Linear algebra on low-rank deltas that never forms the dense matrix: thin QR, then an SVD of the small core."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from composer.deltas import LoadedLowRank

__all__ = ["float32_pair", "kept_rank", "leading", "stacked", "thin_svd", "truncate"]

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


def kept_rank(squares: np.ndarray, rank: int | None, energy: float | None) -> int:
    """How many singular values are kept: `rank` of them, or the fewest that hold the share `energy`; at least 1.

    squares: the squared singular values, largest first.
    """
    if rank is not None:
        return rank
    held = np.cumsum(squares)
    wanted = (1.0 if energy is None else energy) * held[-1] if len(held) else 0.0
    return 1 + int(np.searchsorted(held[:-1], wanted))


def truncate(
    left: np.ndarray, right: np.ndarray, *, rank: int | None = None, energy: float | None = None
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The best approximation of left·right at `rank`, or of the lowest rank that holds the share `energy` of it.

    left [rows, r], right [r, columns]. Returns float64 U√S [rows, k] and √S·Vᵀ [k, columns], the energy that is left
    out (the sum of the squared singular values) and all of it. Zeros fill up where the product has a rank below k.
    Source: Eckart, Young 1936
    """
    u, s, v = thin_svd(left, right)
    squares = np.square(s)
    k = kept_rank(squares, rank, energy)
    root = np.sqrt(s[:k])
    pad = k - len(root)
    return (
        np.pad(u[:, :k] * root, ((0, 0), (0, pad))),
        np.pad(v[:k] * root[:, None], ((0, pad), (0, 0))),
        float(squares[k:].sum()),
        float(squares.sum()),
    )


def leading(
    matrix: np.ndarray, *, rank: int | None = None, energy: float | None = None
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """As `truncate`, for a dense float64 matrix [rows, columns]; the rank is at most its smaller side.

    By the eigenvectors V of the smaller Gram matrix: M·V·Vᵀ is the projection that the SVD gives, at a fraction of its
    cost. Directions below 1e-8 of the largest are noise, as they are in a difference of float32 weights.
    """
    rows, columns = matrix.shape
    if rows < columns:
        left, right, lost, total = leading(matrix.T, rank=rank, energy=energy)
        return right.T, left.T, lost, total
    squares, vectors = np.linalg.eigh(matrix.T @ matrix)
    squares, vectors = np.maximum(squares[::-1], 0), vectors[:, ::-1]
    k = min(kept_rank(squares, rank, energy), columns)
    image = matrix @ vectors[:, :k]
    root = np.sqrt(np.linalg.norm(image, axis=0))
    divisor = np.where(root > 0, root, 1)
    return image / divisor, vectors[:, :k].T * root[:, None], float(squares[k:].sum()), float(squares.sum())

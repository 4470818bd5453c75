"""What merge methods share: which numbers of a delta are kept, and which of several deltas agree in sign."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["drop", "keep_largest", "largest", "merge_agreeing", "merge_elected_unweighted", "weighted_sum"]


def weighted_sum(deltas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Σ wᵢ·Δᵢ in float32, in order, as a new array."""
    total = deltas[0] * np.float32(weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total += delta * np.float32(weight)
    return total


def keep_largest(delta: np.ndarray, density: float, skip: int = 0) -> np.ndarray:
    """`delta` with all but ⌊density·n⌋ of its n numbers set to 0: the largest by magnitude after the `skip` largest.

    Numbers of equal magnitude are taken in their order of rows. Returns float32; may be `delta` itself.
    """
    count = min(int(density * delta.size), delta.size - skip)
    if count == delta.size:
        return delta
    size = np.abs(delta).ravel()
    kept = (largest(size, skip + count) & ~largest(size, skip)).reshape(delta.shape)
    return np.where(kept, delta, np.float32(0))


def largest(size: np.ndarray, count: int) -> np.ndarray:
    """A mask of exactly `count` largest numbers; the first of equal ones."""
    if count == 0:
        return np.zeros(size.shape, bool)
    threshold = np.partition(size, size.size - count)[size.size - count]
    mask = size > threshold
    equal = np.flatnonzero(size == threshold)
    mask[equal[: count - int(np.count_nonzero(mask))]] = True
    return mask


def drop(delta: np.ndarray, density: float | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keep each number with probability `density` and divide it by that; the others become 0 (arXiv:2311.03099 §3).

    Draws one float64 a number from `rng`, so that blocks of rows draw what the whole tensor would.
    """
    kept = rng.random(delta.shape) < density
    return np.where(kept, delta / np.asarray(density, np.float32), np.float32(0))


def merge_agreeing(deltas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Elect a sign for each number, then average what agrees with it (TIES, arXiv:2306.01708 §3 steps 2 and 3).

    The elected sign is that of Σ wᵢ·Δᵢ, positive where it is 0. The result is Σ wᵢ·Δᵢ over the terms of that sign,
    divided by how many these are; 0 where there are none. Without weights this is the paper's formula.
    """
    weighted = [delta * np.float32(weight) for delta, weight in zip(deltas, weights, strict=True)]
    positive = weighted_sum(deltas, weights) >= 0
    total, count = np.zeros_like(weighted[0]), np.zeros(weighted[0].shape, np.float32)
    for term in weighted:
        agrees = np.where(positive, term > 0, term < 0)
        total += np.where(agrees, term, np.float32(0))
        count += agrees
    return total / np.maximum(count, np.float32(1))


def merge_elected_unweighted(parts: Sequence[np.ndarray], weights: Sequence[float], by_frequency: bool) -> np.ndarray:
    """As `merge_agreeing`, but a sign is elected before the weights and by the numbers' own signs, as PEFT does.

    by_frequency: the sign that most numbers have is elected, not that of their sum.
    """
    votes = [np.sign(part) for part in parts] if by_frequency else parts
    elected = np.where(weighted_sum(votes, [1.0] * len(votes)) >= 0, np.float32(1), np.float32(-1))
    agreeing = [np.sign(part) == elected for part in parts]
    total = weighted_sum([part * mask for part, mask in zip(parts, agreeing, strict=True)], weights)
    return total / np.maximum(np.sum(agreeing, axis=0, dtype=np.float32), np.float32(1))

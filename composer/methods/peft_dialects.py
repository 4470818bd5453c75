"""PEFT's combinations of A and B apart, for adapters that must behave as they do there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np

from composer.deltas import LoadedLowRank
from composer.methods import Choice, Range, merge_method
from composer.sparsity import keep_largest, weighted_sum

__all__ = ["linear_peft", "magnitude_prune_peft", "ties_peft"]

Pair = tuple[np.ndarray, np.ndarray]
Combine = Callable[[Sequence[np.ndarray], Sequence[float]], np.ndarray]


@merge_method(name="linear@peft", factors=True, equal_ranks=True)
def linear_peft(deltas: Sequence[LoadedLowRank], weights: Sequence[float]) -> Pair:
    """PEFT's `linear`: (Σ √|vᵢ|·Bᵢ)·(Σ ±√|vᵢ|·Aᵢ) with vᵢ = wᵢ·scaleᵢ, which adds cross terms BᵢAⱼ.

    deltas: loaded low-rank deltas of one rank. Returns (left, right), float32 [rows, r] and [r, columns].
    Source: PEFT's add_weighted_adapter
    """
    return _apart(deltas, weights, weighted_sum)


@merge_method(name="magnitude_prune@peft", factors=True, equal_ranks=True)
def magnitude_prune_peft(
    deltas: Sequence[LoadedLowRank],
    weights: Sequence[float],
    *,
    density: Annotated[float, Range(0, 1, above=True)] = 0.5,
) -> Pair:
    """PEFT's `magnitude_prune`: as `linear@peft`, after each A and each B keeps its ⌊density·n⌋ largest numbers.

    deltas: loaded low-rank deltas of one rank. Returns (left, right), float32.
    Source: PEFT's add_weighted_adapter
    """
    return _apart(deltas, weights, lambda parts, by: weighted_sum([keep_largest(part, density) for part in parts], by))


@merge_method(name="ties@peft", factors=True, equal_ranks=True)
def ties_peft(
    deltas: Sequence[LoadedLowRank],
    weights: Sequence[float],
    *,
    density: Annotated[float, Range(0, 1, above=True)] = 0.2,
    majority_sign: Annotated[str, Choice(("total", "frequency"))] = "total",
) -> Pair:
    """PEFT's `ties`: A and B are each trimmed, elected on before the weights, and averaged by count.

    majority_sign: whether the sign of the sum is elected or that of most. deltas: loaded low-rank deltas of one rank.
    Returns (left, right), float32.
    Source: PEFT's add_weighted_adapter
    """

    def merge(parts: Sequence[np.ndarray], by: Sequence[float]) -> np.ndarray:
        kept = [keep_largest(part, density) for part in parts]
        votes = kept if majority_sign == "total" else [np.sign(part) for part in kept]
        elected = np.where(weighted_sum(votes, [1.0] * len(votes)) >= 0, np.float32(1), np.float32(-1))
        agreeing = [np.sign(part) == elected for part in kept]
        total = weighted_sum([part * mask for part, mask in zip(kept, agreeing, strict=True)], by)
        return total / np.maximum(np.sum(agreeing, axis=0, dtype=np.float32), np.float32(1))

    return _apart(deltas, weights, merge)


def _apart(deltas: Sequence[LoadedLowRank], weights: Sequence[float], combine: Combine) -> Pair:
    """Combine the factors of each side, with the roots of weight and scale; A takes the sign."""
    values = [float(weight) * float(delta.scale) for delta, weight in zip(deltas, weights, strict=True)]
    roots = [abs(value) ** 0.5 for value in values]
    signed = [root if value >= 0 else -root for root, value in zip(roots, values, strict=True)]
    left_roots, right_roots = (signed, roots) if deltas[0].transposed else (roots, signed)
    left = combine([delta.left for delta in deltas], left_roots)
    return left, combine([delta.right for delta in deltas], right_roots)

"""PEFT's combinations of A and B apart, for adapters that must behave as they do there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np

from composer.deltas import LoadedLowRank
from composer.methods import Choice, Range, merge_method
from composer.sparsity import drop, keep_largest, merge_elected_unweighted, weighted_sum

__all__ = ["dare_linear_peft", "dare_ties_peft", "linear_peft", "magnitude_prune_peft", "ties_peft"]

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
        return merge_elected_unweighted(kept, by, majority_sign == "frequency")

    return _apart(deltas, weights, merge)


@merge_method(name="dare_linear@peft", factors=True, equal_ranks=True)
def dare_linear_peft(
    deltas: Sequence[LoadedLowRank],
    weights: Sequence[float],
    *,
    rng: Sequence[np.random.Generator],
    density: Annotated[float, Range(0, 1, above=True)] = 0.5,
) -> Pair:
    """PEFT's `dare_linear`: as `linear@peft`, after random numbers of each A and each B are dropped, the rest rescaled.

    The masks are of this recipe's seed, not of torch's generator: they have PEFT's distribution, not its bits.
    deltas: loaded low-rank deltas of one rank. rng: one generator a delta. Returns (left, right), float32.
    Source: PEFT's add_weighted_adapter
    """
    return _apart(deltas, weights, lambda parts, by: weighted_sum(_dropped(parts, density, rng), by))


@merge_method(name="dare_ties@peft", factors=True, equal_ranks=True)
def dare_ties_peft(
    deltas: Sequence[LoadedLowRank],
    weights: Sequence[float],
    *,
    rng: Sequence[np.random.Generator],
    density: Annotated[float, Range(0, 1, above=True)] = 0.5,
    majority_sign: Annotated[str, Choice(("total", "frequency"))] = "total",
) -> Pair:
    """PEFT's `dare_ties`: `ties@peft` with the random drop of `dare_linear@peft` in place of the trimming.

    deltas: loaded low-rank deltas of one rank. rng: one generator a delta. Returns (left, right), float32.
    Source: PEFT's add_weighted_adapter
    """

    def merge(parts: Sequence[np.ndarray], by: Sequence[float]) -> np.ndarray:
        return merge_elected_unweighted(_dropped(parts, density, rng), by, majority_sign == "frequency")

    return _apart(deltas, weights, merge)


def _dropped(parts: Sequence[np.ndarray], density: float, rng: Sequence[np.random.Generator]) -> list[np.ndarray]:
    return [drop(part, density, each) for part, each in zip(parts, rng, strict=True)]


def _apart(deltas: Sequence[LoadedLowRank], weights: Sequence[float], combine: Combine) -> Pair:
    """Combine the factors of each side, left first, with the roots of weight and scale; A takes the sign."""
    values = [float(weight) * float(delta.scale) for delta, weight in zip(deltas, weights, strict=True)]
    roots = [abs(value) ** 0.5 for value in values]
    signed = [root if value >= 0 else -root for root, value in zip(roots, values, strict=True)]
    left_roots, right_roots = (signed, roots) if deltas[0].transposed else (roots, signed)
    left = combine([delta.left for delta in deltas], left_roots)
    return left, combine([delta.right for delta in deltas], right_roots)

"""PEFT's combinations of whole deltas at a rank: its names that end in _svd, for adapters that must behave as there.

Each is a method on dense deltas, followed by the best approximation at `rank` (0: the largest among the tensor's
adapters). PEFT's `svd` itself is `svd`; its clamping is left out, since it depends on the signs of singular vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import numpy as np

from composer.deltas import LoadedLowRank
from composer.factors import float32_pair, leading
from composer.methods import Choice, Range, merge_method
from composer.product import product
from composer.sparsity import drop, keep_largest, merge_elected_unweighted, weighted_sum

__all__ = ["dare_linear_svd_peft", "dare_ties_svd_peft", "magnitude_prune_svd_peft", "ties_svd_peft"]

Pair: TypeAlias = tuple[np.ndarray, np.ndarray]
Density: TypeAlias = Annotated[float, Range(0, 1, above=True)]
Rank: TypeAlias = Annotated[int, Range(0, 1 << 16)]
MajoritySign: TypeAlias = Annotated[str, Choice(("total", "frequency"))]


@merge_method(name="magnitude_prune_svd@peft", factors=True)
def magnitude_prune_svd_peft(
    deltas: Sequence[LoadedLowRank], weights: Sequence[float], *, density: Density = 0.5, rank: Rank = 0
) -> Pair:
    """PEFT's `magnitude_prune_svd`: `magnitude_prune` at a rank.

    deltas: loaded low-rank deltas. Returns (left, right), float32 [rows, k] and [k, columns] with k up to `rank`.
    Source: PEFT's add_weighted_adapter
    """
    return _at_rank(weighted_sum([keep_largest(each, density) for each in _dense(deltas)], weights), deltas, rank)


@merge_method(name="ties_svd@peft", factors=True)
def ties_svd_peft(
    deltas: Sequence[LoadedLowRank],
    weights: Sequence[float],
    *,
    density: Density = 0.2,
    majority_sign: MajoritySign = "total",
    rank: Rank = 0,
) -> Pair:
    """PEFT's `ties_svd`: `ties` with the election before the weights, at a rank.

    majority_sign: whether the sign of the sum is elected or that of most. deltas: loaded low-rank deltas.
    Returns (left, right), float32.
    Source: PEFT's add_weighted_adapter
    """
    kept = [keep_largest(each, density) for each in _dense(deltas)]
    return _at_rank(merge_elected_unweighted(kept, weights, majority_sign == "frequency"), deltas, rank)


@merge_method(name="dare_linear_svd@peft", factors=True)
def dare_linear_svd_peft(
    deltas: Sequence[LoadedLowRank],
    weights: Sequence[float],
    *,
    rng: Sequence[np.random.Generator],
    density: Density = 0.5,
    rank: Rank = 0,
) -> Pair:
    """PEFT's `dare_linear_svd`: `dare_linear` at a rank; the masks are of this recipe's seed, not of torch's generator.

    deltas: loaded low-rank deltas. rng: one generator a delta. Returns (left, right), float32.
    Source: PEFT's add_weighted_adapter
    """
    kept = [drop(each, density, generator) for each, generator in zip(_dense(deltas), rng, strict=True)]
    return _at_rank(weighted_sum(kept, weights), deltas, rank)


@merge_method(name="dare_ties_svd@peft", factors=True)
def dare_ties_svd_peft(
    deltas: Sequence[LoadedLowRank],
    weights: Sequence[float],
    *,
    rng: Sequence[np.random.Generator],
    density: Density = 0.5,
    majority_sign: MajoritySign = "total",
    rank: Rank = 0,
) -> Pair:
    """PEFT's `dare_ties_svd`: `ties_svd@peft` with the random drop of `dare_linear_svd@peft` in place of the trimming.

    deltas: loaded low-rank deltas. rng: one generator a delta. Returns (left, right), float32.
    Source: PEFT's add_weighted_adapter
    """
    kept = [drop(each, density, generator) for each, generator in zip(_dense(deltas), rng, strict=True)]
    return _at_rank(merge_elected_unweighted(kept, weights, majority_sign == "frequency"), deltas, rank)


def _dense(deltas: Sequence[LoadedLowRank]) -> list[np.ndarray]:
    return [product(delta.left, delta.right) * delta.scale for delta in deltas]


def _at_rank(merged: np.ndarray, deltas: Sequence[LoadedLowRank], rank: int) -> Pair:
    left, right, *_ = leading(merged.astype(np.float64), rank=rank or max(delta.right.shape[0] for delta in deltas))
    return float32_pair(left, right)

"""Drop small numbers more often, rescale, merge what agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from composer.methods import Range, merge_method
from composer.sparsity import drop, merge_agreeing

__all__ = ["della"]


def _inside(values: Mapping[str, Any]) -> str | None:
    low, high = values["density"] - values["epsilon"] / 2, values["density"] + values["epsilon"] / 2
    return None if low > 0 and high <= 1 else f"needs density ± epsilon/2 in (0, 1], found {low:g} to {high:g}"


@merge_method(check=_inside)
def della(
    deltas: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    rng: Sequence[np.random.Generator],
    density: Annotated[float, Range(0, 1, above=True)] = 0.5,
    epsilon: Annotated[float, Range(0, 1)] = 0.2,
    scaling: Annotated[float, Range(-100, 100)] = 1.0,
) -> np.ndarray:
    """Drop each number with a probability that falls with its rank in its row, rescale, then elect and average.

    A row's largest of n numbers is kept with probability density + epsilon/2, each smaller one with epsilon/n less;
    what is kept is divided by its probability. The rest is `ties`. Equal magnitudes rank in the order of columns.
    deltas: float32 blocks [rows, columns], not changed. rng: one generator a delta. Returns float32.
    Source: arXiv:2406.11617 §3 (MagPrune with p = 1 - density, then Elect and Fuse)
    """
    kept = [drop(delta, _keep(delta, density, epsilon), each) for delta, each in zip(deltas, rng, strict=True)]
    return merge_agreeing(kept, weights) * np.float32(scaling)


def _keep(delta: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    rank = np.argsort(np.argsort(-np.abs(delta), axis=1, kind="stable"), axis=1, kind="stable")
    return density + epsilon / 2 - epsilon / delta.shape[1] * rank

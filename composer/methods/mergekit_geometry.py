"""mergekit's slerp and model_stock, which turn and average whole weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.methods import Choice, Range, merge_method
from composer.methods.slerp import on_the_arc
from composer.sparsity import weighted_sum

__all__ = ["model_stock_mergekit", "slerp_mergekit"]

SMALLEST = 1e-6


@merge_method(name="slerp@mergekit", whole=True, terms=1)
def slerp_mergekit(
    deltas: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    base: np.ndarray,
    t: Annotated[float, Range(0, 1)] = 0.5,
) -> np.ndarray:
    """mergekit's `slerp`: the point at `t` on the arc from the base W to W + w·Δ, for each tensor that changes.

    deltas: one float32 [rows, columns], not changed. base: the base's weight, float32. Returns the change, float32.
    Source: mergekit's `slerp`
    """
    original = base.astype(np.float64)
    changed = original + deltas[0].astype(np.float64) * weights[0]
    return (on_the_arc(original, changed, t) - original).astype(np.float32)


@merge_method(name="model_stock@mergekit", whole=True)
def model_stock_mergekit(
    deltas: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    filter_wise: Annotated[str, Choice(("yes", "no"))] = "no",
) -> np.ndarray:
    """mergekit's `model_stock`: as `model_stock`, with cosines below 0 as they are, and for each row if filter_wise.

    Opposed deltas then give a ratio below 0, and 0 where the formula has a pole. One delta alone is kept as it is.
    deltas: float32 [rows, columns], not changed. Returns float32.
    Source: mergekit's `model_stock`, which has no weights
    """
    k = len(deltas)
    if k == 1:
        return weighted_sum(deltas, weights)
    scaled = [delta.astype(np.float64) * weight for delta, weight in zip(deltas, weights, strict=True)]
    rows = scaled if filter_wise == "yes" else [term.reshape(1, -1) for term in scaled]
    norms = [np.sqrt(np.square(term).sum(axis=1)) for term in rows]
    cosines = [
        np.clip((rows[i] * rows[j]).sum(axis=1) / np.maximum(norms[i] * norms[j], SMALLEST), -1, 1)
        for i in range(k)
        for j in range(i)
    ]
    cosine = np.mean(cosines, axis=0)
    divisor = 1 + (k - 1) * cosine
    pole = np.abs(divisor) < SMALLEST
    ratio = np.where(pole, 0.0, k * cosine / np.where(pole, 1.0, divisor))
    return (sum(scaled) * (ratio[:, None] / k)).astype(np.float32)

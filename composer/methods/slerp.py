"""The arc between two deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from composer.methods import Range, merge_method
from composer.sparsity import weighted_sum

__all__ = ["on_the_arc", "slerp"]

NEARLY_PARALLEL = 0.9995


@merge_method(whole=True, terms=2)
def slerp(
    deltas: Sequence[np.ndarray], weights: Sequence[float], *, t: Annotated[float, Range(0, 1)] = 0.5
) -> np.ndarray:
    """The point at `t` on the arc from the first delta to the second: (sin((1-t)θ)·Δ₁ + sin(tθ)·Δ₂) / sin θ.

    θ is the angle between the weighted deltas of the whole tensor. Nearly parallel ones are interpolated linearly. A
    tensor that only one adapter changes takes that adapter's weighted delta.
    deltas: one or two float32 [rows, columns], not changed. Returns float32.
    Source: Shoemake 1985, eq. for Slerp; unlike model-wise slerp it turns deltas, not weights.
    """
    if len(deltas) == 1:
        return weighted_sum(deltas, weights)
    first, second = (delta.astype(np.float64) * weight for delta, weight in zip(deltas, weights, strict=True))
    return on_the_arc(first, second, t).astype(np.float32)


def on_the_arc(first: np.ndarray, second: np.ndarray, t: float) -> np.ndarray:
    """The point at `t` between two float64 arrays of one shape, on the arc or, if nearly parallel, on the line."""
    norms = np.sqrt((first * first).sum() * (second * second).sum())
    cosine = float((first * second).sum() / norms) if norms > 0 else 1.0
    if abs(cosine) > NEARLY_PARALLEL:
        return (1 - t) * first + t * second
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)

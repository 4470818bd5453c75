"""Select by variance, weigh by energy, erase the minority."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import numpy as np

from composer.methods import Range, merge_method
from composer.sparsity import largest, weighted_sum

__all__ = ["sce", "sce_mergekit"]

Density: TypeAlias = Annotated[float, Range(0, 1, above=True)]
FLOOR = 1e-6  # mergekit's


@merge_method(whole=True)
def sce(deltas: Sequence[np.ndarray], weights: Sequence[float], *, density: Density = 1.0) -> np.ndarray:
    """Select the numbers that vary most between the deltas, weigh each delta by its energy, average what agrees.

    Of the numbers whose variance over the weighted deltas is not 0, the share `density` that varies most is kept. Each
    delta then counts by its share ηᵢ of the sum of squares, and a number becomes Σ ηᵢ·wᵢ·Δᵢ / Σ ηᵢ over those that have
    the sign of Σ wᵢ·Δᵢ (positive where that is 0). One delta alone has no variance and is kept as it is.
    deltas: float32 [rows, columns], not changed. Returns float32; 0 where nothing is left.
    Source: arXiv:2408.07990 §3.3 (SCE), where all weights are 1
    """
    return _merge(deltas, weights, density, 0.0)


@merge_method(name="sce@mergekit", whole=True)
def sce_mergekit(deltas: Sequence[np.ndarray], weights: Sequence[float], *, density: Density = 1.0) -> np.ndarray:
    """As `sce`, but all deltas count alike where their mean squares sum to less than 1e-6, as small LoRAs' do.

    deltas: float32 [rows, columns], not changed. Returns float32.
    Source: mergekit's `sce`, whose select_topk is `density`, and which has no weights
    """
    return _merge(deltas, weights, density, FLOOR)


def _merge(deltas: Sequence[np.ndarray], weights: Sequence[float], density: float, floor: float) -> np.ndarray:
    if len(deltas) == 1:
        return weighted_sum(deltas, weights)
    terms = [delta * np.float32(weight) for delta, weight in zip(deltas, weights, strict=True)]
    if density < 1:
        variance = np.var(np.stack(terms), axis=0, dtype=np.float64).ravel()
        selected = largest(variance, int(np.count_nonzero(variance) * density)).reshape(terms[0].shape)
        terms = [np.where(selected, term, np.float32(0)) for term in terms]
    energies = [float(np.mean(np.square(term, dtype=np.float64))) for term in terms]
    if sum(energies) < floor:
        energies = [1.0] * len(terms)
    positive = weighted_sum(terms, [1.0] * len(terms)) >= 0
    total, mass = np.zeros(terms[0].shape), np.zeros(terms[0].shape)
    for term, energy in zip(terms, energies, strict=True):
        agrees = np.where(positive, term > 0, term < 0)
        total += np.where(agrees, term * energy, 0)
        mass += np.where(agrees, energy, 0)
    return np.divide(total, mass, out=np.zeros_like(total), where=mass > 0).astype(np.float32)

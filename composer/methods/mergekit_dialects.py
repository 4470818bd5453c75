"""mergekit's readings of the papers, for recipes that must behave as they do there; its defaults are taken as well.

    trim or drop each delta ─► L1 norm as before (dare, della) ─► weights ─► elect a sign ─► sum ─► ÷ Σ w (normalize)

They differ from the methods of the same names in these ways: random drops are followed by a rescaling to the L1 norm
that the delta had, not by a division by the density; the divisor is the weights that agree, not how many; DELLA's
probabilities rise linearly by rank from density - epsilon to density + epsilon. mergekit's task_arithmetic is
`task_arithmetic`; its nuslerp over a base is `slerp` at t = w₂/(w₁ + w₂). Source: mergekit 0.1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import numpy as np

from composer.methods import Choice, Range, merge_method
from composer.sparsity import keep_largest, weighted_sum

__all__ = [
    "breadcrumbs_mergekit",
    "breadcrumbs_ties_mergekit",
    "dare_linear_mergekit",
    "dare_ties_mergekit",
    "della_linear_mergekit",
    "della_mergekit",
    "ties_mergekit",
]

Deltas: TypeAlias = Sequence[np.ndarray]
Generators: TypeAlias = Sequence[np.random.Generator]
Density: TypeAlias = Annotated[float, Range(0, 1, above=True)]
Gamma: TypeAlias = Annotated[float, Range(0, 1)]
Epsilon: TypeAlias = Annotated[float, Range(0, 1)]
Scaling: TypeAlias = Annotated[float, Range(-100, 100)]
YesNo: TypeAlias = Annotated[str, Choice(("yes", "no"))]
SMALLEST_NORM = 1e-7  # below it nothing is rescaled


def _inside(values: Mapping[str, Any]) -> str | None:
    low, high = values["density"] - values["epsilon"], values["density"] + values["epsilon"]
    if values["density"] == 1 or (low > 0 and high < 1):
        return None
    return f"needs density ± epsilon in (0, 1), or a density of 1, found {low:g} to {high:g}"


@merge_method(name="ties@mergekit", whole=True)
def ties_mergekit(
    deltas: Deltas, weights: Sequence[float], *, density: Density = 1.0, scaling: Scaling = 1.0,
    normalize: YesNo = "yes",
) -> np.ndarray:  # fmt: skip
    """mergekit's `ties`: trim, weigh, elect a sign, and divide by the sum of the weights that agree.

    At least one number of a delta is kept. deltas: float32 [rows, columns], not changed. Returns float32.
    Source: mergekit's `ties`, whose lambda is `scaling`
    """
    return _elected([_trimmed(delta, density) for delta in deltas], weights, normalize) * np.float32(scaling)


@merge_method(name="dare_linear@mergekit", whole=True)
def dare_linear_mergekit(
    deltas: Deltas, weights: Sequence[float], *, rng: Generators, density: Density = 1.0, scaling: Scaling = 1.0,
    rescale: YesNo = "yes",
) -> np.ndarray:  # fmt: skip
    """mergekit's `dare_linear`: drop at random, rescale to the L1 norm of before, sum.

    deltas: float32 [rows, columns], not changed. rng: one generator a delta. Returns float32.
    Source: mergekit's `dare_linear`; the masks are of this recipe's seed
    """
    return weighted_sum(_dropped(deltas, density, rng, rescale), weights) * np.float32(scaling)


@merge_method(name="dare_ties@mergekit", whole=True)
def dare_ties_mergekit(
    deltas: Deltas, weights: Sequence[float], *, rng: Generators, density: Density = 1.0, scaling: Scaling = 1.0,
    normalize: YesNo = "no", rescale: YesNo = "yes",
) -> np.ndarray:  # fmt: skip
    """mergekit's `dare_ties`: drop at random, rescale to the L1 norm of before, weigh, elect a sign, sum what agrees.

    deltas: float32 [rows, columns], not changed. rng: one generator a delta. Returns float32.
    Source: mergekit's `dare_ties`; the masks are of this recipe's seed
    """
    return _elected(_dropped(deltas, density, rng, rescale), weights, normalize) * np.float32(scaling)


@merge_method(name="breadcrumbs@mergekit", whole=True)
def breadcrumbs_mergekit(
    deltas: Deltas, weights: Sequence[float], *, density: Density = 1.0, gamma: Gamma = 0.01, scaling: Scaling = 1.0
) -> np.ndarray:
    """mergekit's `breadcrumbs`: as `breadcrumbs`, but fewer outliers are left out where ⌊density·n⌋ would not remain.

    deltas: float32 [rows, columns], not changed. Returns float32.
    Source: mergekit's `breadcrumbs`
    """
    return weighted_sum([_without_outliers(delta, density, gamma) for delta in deltas], weights) * np.float32(scaling)


@merge_method(name="breadcrumbs_ties@mergekit", whole=True)
def breadcrumbs_ties_mergekit(
    deltas: Deltas, weights: Sequence[float], *, density: Density = 1.0, gamma: Gamma = 0.01, scaling: Scaling = 1.0,
    normalize: YesNo = "no",
) -> np.ndarray:  # fmt: skip
    """mergekit's `breadcrumbs_ties`: leave out outliers and small numbers, weigh, elect a sign, sum what agrees.

    deltas: float32 [rows, columns], not changed. Returns float32.
    Source: mergekit's `breadcrumbs_ties`
    """
    kept = [_without_outliers(delta, density, gamma) for delta in deltas]
    return _elected(kept, weights, normalize) * np.float32(scaling)


@merge_method(name="della@mergekit", whole=True, check=_inside)
def della_mergekit(
    deltas: Deltas, weights: Sequence[float], *, rng: Generators, density: Density = 1.0, epsilon: Epsilon = 0.15,
    scaling: Scaling = 1.0, normalize: YesNo = "yes", rescale: YesNo = "yes",
) -> np.ndarray:  # fmt: skip
    """mergekit's `della`: drop small numbers more often, rescale to the L1 norm of before, weigh, elect, average.

    deltas: float32 [rows, columns], not changed; a vector is one row. rng: one generator a delta. Returns float32.
    Source: mergekit's `della`; the masks are of this recipe's seed
    """
    kept = _dropped(deltas, density, rng, rescale, epsilon)
    return _elected(kept, weights, normalize) * np.float32(scaling)


@merge_method(name="della_linear@mergekit", whole=True, check=_inside)
def della_linear_mergekit(
    deltas: Deltas, weights: Sequence[float], *, rng: Generators, density: Density = 1.0, epsilon: Epsilon = 0.15,
    scaling: Scaling = 1.0, rescale: YesNo = "yes",
) -> np.ndarray:  # fmt: skip
    """mergekit's `della_linear`: drop small numbers more often, rescale to the L1 norm of before, sum.

    deltas: float32 [rows, columns], not changed; a vector is one row. rng: one generator a delta. Returns float32.
    Source: mergekit's `della_linear`; the masks are of this recipe's seed
    """
    return weighted_sum(_dropped(deltas, density, rng, rescale, epsilon), weights) * np.float32(scaling)


def _trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    return keep_largest(delta, max(density, 1 / delta.size))


def _without_outliers(delta: np.ndarray, density: float, gamma: float) -> np.ndarray:
    target = int(density * delta.size)
    return keep_largest(delta, density, skip=min(int(gamma * delta.size), delta.size - target))


def _dropped(
    deltas: Deltas, density: float, rng: Generators, rescale: str, epsilon: float | None = None
) -> list[np.ndarray]:
    if density == 1:
        return list(deltas)
    kept = []
    for delta, generator in zip(deltas, rng, strict=True):
        chance = density if epsilon is None else _chances(delta, density, epsilon)
        part = np.where(generator.random(delta.shape) < chance, delta, np.float32(0))
        before, after = (float(np.abs(each).sum(dtype=np.float64)) for each in (delta, part))
        rescaled = rescale == "yes" and min(before, after) >= SMALLEST_NORM
        kept.append(part * np.float32(before / after) if rescaled else part)
    return kept


def _chances(delta: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    rows = delta if delta.shape[1] > 1 else delta.reshape(1, -1)
    rank = np.argsort(np.argsort(np.abs(rows), axis=1, kind="stable"), axis=1, kind="stable")
    chances = density - epsilon + 2 * epsilon * rank / max(1, rows.shape[1] - 1)
    return chances.reshape(delta.shape)


def _elected(deltas: Sequence[np.ndarray], weights: Sequence[float], normalize: str) -> np.ndarray:
    """The sum of the weighted deltas that have the sign of it; normalize: divided by the sum of their weights."""
    positive = weighted_sum(deltas, weights) >= 0
    total, mass = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        term = delta * np.float32(weight)
        agrees = np.where(positive, term > 0, term < 0)
        total += np.where(agrees, term, np.float32(0))
        mass += np.where(agrees, np.float32(weight), np.float32(0))
    if normalize == "yes":
        total /= np.where(mass == 0, np.float32(1), mass)
    return total

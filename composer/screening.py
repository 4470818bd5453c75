"""What can be measured of an adapter's weights without running them: how strong it is, where, in how many directions.

measure      of one adapter, from the factors of its low-rank changes alone: no base is needed
measure_sum  of adapters that are summed, with how much stronger the sum is than its parts

Singular values come from the r x r Gram matrices of the factors; the change itself is never formed. Other changes than
low-rank ones are left out: for these, what is known is which modules they touch. What a number means is for
registry.screening to say.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from composer.adapters import Adapter
from composer.deltas import Delta, LoadedLowRank, LowRank
from composer.deltas_dora import Dora
from composer.errors import TypedError
from composer.plan import Plan

__all__ = ["Measurement", "measure", "measure_sum", "modified_z", "module_kind"]

MIN_SIBLINGS = 8
LOG_SPREAD = 0.1  # the least spread that logarithms of singular values are taken to have
TO_SIGMA = 0.6745  # of the median absolute deviation, for normal numbers
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Numbers about an adapter or a sum; None where it has no, or too few, low-rank changes.

    norm: of all changes together (Frobenius). rms: the same for one changed number. share: of the energy that the first
    singular directions hold. outlier: the modified z-score of the largest first singular value among modules of its
    kind, in logarithms. concentration: the strongest module's energy, in even shares. stacking: the largest
    ‖Σ wᵢΔᵢ‖ / √Σ‖wᵢΔᵢ‖² of a tensor, which is 1 for changes that have nothing to do with each other and √k for k that
    are the same. The module of each is named beside it; kinds are all that are touched.
    """

    kinds: tuple[str, ...]
    norm: float | None = None
    rms: float | None = None
    share: float | None = None
    outlier: float | None = None
    outlier_at: str | None = None
    concentration: float | None = None
    concentration_at: str | None = None
    stacking: float | None = None
    stacking_at: str | None = None

    def as_json(self) -> dict[str, Any]:
        """As a catalogue keeps it."""
        return {**asdict(self), "kinds": list(self.kinds)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Measurement:
        """What `as_json` gave."""
        return cls(**{**fields, "kinds": tuple(fields["kinds"])})


def module_kind(parameter: str) -> str:
    """What a module is called in every layer: ``model.layers.3.self_attn.q_proj.weight`` is a ``q_proj``."""
    path = parameter.removesuffix(".weight").removesuffix(".bias").split(".")
    return ".".join(path[-2:]) if path[-1].isdigit() else path[-1]


def measure(adapter: Adapter) -> Measurement:
    """An adapter by itself."""
    targets = [target.parameter for target in adapter.signature.targets if not target.parameter.startswith("@")]
    try:
        deltas: list[Delta] = adapter.deltas({name: name for name in targets})
        return _measured(targets, ((each.target, [pair]) for each in deltas if (pair := _pair(each, 1.0)) is not None))
    except (TypedError, KeyError):  # a kind whose changes depend on the base, or numbers that are none
        return _measured(targets, ())


def measure_sum(plan: Plan) -> Measurement:
    """What a plan adds to the base, where that is a sum of low-rank changes."""
    jobs = [job for job in plan.jobs if job.deltas]
    parts = ((job.name, [pair for item in job.deltas if (pair := _pair(item.delta, item.weight))]) for job in jobs)
    return _measured([job.name for job in jobs], ((name, pairs) for name, pairs in parts if pairs))


def modified_z(value: float, others: Sequence[float], spread: float) -> float:
    """How far `value` lies from the median of `others`, in units of a standard deviation that outliers do not move.

    spread: the least median absolute deviation that is taken, so that others who agree too well alarm nobody.
    Source: Iglewicz, Hoaglin 1993, How to Detect and Handle Outliers
    """
    median = float(np.median(others))
    deviation = float(np.median(np.abs(np.asarray(others) - median)))
    return TO_SIGMA * (value - median) / max(deviation, spread)


def _pair(delta: Delta, weight: float) -> Pair | None:
    """Left [rows, r], scaled and weighted, and right [r, columns], float32."""
    low_rank = delta.low_rank if isinstance(delta, Dora) else delta
    if not isinstance(low_rank, LowRank):
        return None
    loaded: LoadedLowRank = low_rank.load()
    return loaded.left * (loaded.scale * np.float32(weight)), loaded.right


def _measured(touched: Iterable[str], changes: Iterable[tuple[str, list[Pair]]]) -> Measurement:
    energies: dict[str, float] = {}
    first: dict[str, float] = {}
    stacking, elements = {}, 0
    for name, pairs in changes:
        left = np.concatenate([pair[0] for pair in pairs], axis=1)
        right = np.concatenate([pair[1] for pair in pairs])
        inner, outer = (left.T @ left).astype(np.float64), (right @ right.T).astype(np.float64)
        squares = _squares(inner, outer)
        energies[name], first[name] = float(squares.sum()), float(squares.max(initial=0.0))
        elements += left.shape[0] * right.shape[1]
        if len(pairs) > 1 and (apart := _apart(inner, outer, [pair[1].shape[0] for pair in pairs])):
            stacking[name] = math.sqrt(energies[name] / apart)
    kinds = tuple(sorted({module_kind(name) for name in touched}))
    total = sum(energies.values())
    if not total:
        return Measurement(kinds)
    outlier_at, outlier = _outlier(first)
    enough = len(energies) >= MIN_SIBLINGS
    strongest, stacked = max(energies, key=energies.__getitem__), max(stacking, key=stacking.__getitem__, default=None)
    return Measurement(
        kinds,
        norm=math.sqrt(total),
        rms=math.sqrt(total / elements),
        share=sum(first.values()) / total,
        outlier=outlier,
        outlier_at=outlier_at,
        concentration=energies[strongest] * len(energies) / total if enough else None,
        concentration_at=strongest if enough else None,
        stacking=stacking[stacked] if stacked else None,
        stacking_at=stacked,
    )


def _squares(inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """The squared singular values of left·right, from leftᵀ·left and right·rightᵀ [r, r]."""
    values, vectors = np.linalg.eigh(inner)
    root = vectors * np.sqrt(np.maximum(values, 0))
    return np.maximum(np.linalg.eigvalsh(root.T @ outer @ root), 0)


def _apart(inner: np.ndarray, outer: np.ndarray, ranks: Sequence[int]) -> float:
    """Σ ‖leftᵢ·rightᵢ‖²: the blocks on the diagonal alone."""
    ends = np.cumsum(ranks)
    parts = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
    return float(sum(np.vdot(inner[part, part], outer[part, part]) for part in parts))


def _outlier(first: Mapping[str, float]) -> tuple[str | None, float | None]:
    """The module whose first singular value stands out most among those of its kind."""
    siblings: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for name, square in first.items():
        if square > 0:
            siblings[module_kind(name)].append((name, math.log(square) / 2))
    found: dict[str, float] = {}
    for items in siblings.values():
        if len(items) >= MIN_SIBLINGS:
            logs = [value for _, value in items]
            name, largest = max(items, key=lambda item: item[1])
            found[name] = modified_z(largest, logs, LOG_SPREAD)
    name = max(found, key=found.__getitem__, default=None)
    return name, found[name] if name else None

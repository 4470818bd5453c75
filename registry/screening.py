"""What the measurements of an adapter or a composition say: scores, each with its threshold and its source.

spectral-outlier     one module's first singular value stands out among those of its kind in the other layers
energy-concentration one module carries far more than its even share of the whole change
norm-of-population   stronger or weaker than the adapters of this base that are published here
rank-of-population   in fewer, or more, directions than these
unseen-modules       it touches modules that none of these touches
stacked-sum          adapters that are summed push one tensor the same way

Screening refuses nothing, and a quiet score proves nothing: who knows these formulas can stay below them. It says where
to look. Thresholds are this project's (OUR_…), but for that of the modified z-score. On the trained adapters that this
repository holds, the first two reach 3.6 and 9.4; two of them summed reach 1.05 in the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from composer.screening import Measurement, modified_z
from registry.schemas import Score, Screening

__all__ = ["MIN_POPULATION", "alarms", "judge"]

OUR_OUTLIER, OUR_CONCENTRATION, OUR_STACKING = 6.0, 20.0, 1.25
Z = 3.5  # Iglewicz, Hoaglin 1993
MIN_POPULATION = 8
NORM_SPREAD, SHARE_SPREAD = 0.2, 0.5  # of logarithms; an alarm needs at least 2.8 times the median
ARXIV = "https://arxiv.org/abs/"
SPECTRA, POISONED_EMBEDDINGS, COLLUSION = f"{ARXIV}2602.15195", f"{ARXIV}2004.06660", f"{ARXIV}2603.12681"
AMPLIFIED = f"{ARXIV}2411.16746"


def judge(found: Measurement, population: Sequence[Measurement] = ()) -> Screening:
    """The scores of a measurement; population: of the other adapters of its base, MIN_POPULATION at least to count."""
    scores = [*_own(found), *_against(found, population if len(population) >= MIN_POPULATION else ())]
    return Screening(scores=tuple(scores), population=len(population))


def alarms(label: str, screening: Screening | None) -> list[str]:
    """One line for each score above its threshold."""
    return [
        f"screening: {label}: {score.message} [{score.code}, {score.source}]"
        for score in (screening.scores if screening else ())
        if score.alarm
    ]


def _own(found: Measurement) -> list[Score]:
    scores = []
    if found.outlier is not None:
        message = f"{found.outlier_at} has a first singular value far above those of its kind"
        scores.append(_score("spectral-outlier", found.outlier, OUR_OUTLIER, message, SPECTRA, found.outlier_at))
    if found.concentration is not None:
        value, where = found.concentration, found.concentration_at
        message = f"{where} carries {value:.3g} times its even share of the change"
        scores.append(_score("energy-concentration", value, OUR_CONCENTRATION, message, SPECTRA, where))
    if found.stacking is not None:
        value, where = found.stacking, found.stacking_at
        message = f"the adapters push {where} the same way: their sum is {value:.2f} times what unrelated ones give"
        scores.append(_score("stacked-sum", value, OUR_STACKING, message, COLLUSION, where))
    return scores


def _against(found: Measurement, population: Sequence[Measurement]) -> list[Score]:
    scores = []
    count = f"{len(population)} adapters of this base"
    norms = [math.log(item.rms) for item in population if item.rms]
    if found.rms and len(norms) >= MIN_POPULATION:
        z = modified_z(math.log(found.rms), norms, NORM_SPREAD)
        times = math.exp(math.log(found.rms) - median(norms))
        message = f"its change is {times:.3g} times as strong as the median of {count}"
        scores.append(_score("norm-of-population", abs(z), Z, message, AMPLIFIED))
    shares = [_logit(item.share) for item in population if item.share]
    if found.share and len(shares) >= MIN_POPULATION:
        z = modified_z(_logit(found.share), shares, SHARE_SPREAD)
        message = f"{found.share:.1%} of its change lies in first directions, unlike that of {count}"
        scores.append(_score("rank-of-population", abs(z), Z, message, SPECTRA))
    if population and found.kinds:
        unseen = sorted(set(found.kinds) - {kind for item in population for kind in item.kinds})
        message = f"it touches {', '.join(unseen) or 'no module'} that none of {count} touches"
        scores.append(_score("unseen-modules", len(unseen), 1, message, POISONED_EMBEDDINGS, ", ".join(unseen) or None))
    return scores


def _score(code: str, value: float, threshold: float, message: str, source: str, where: str | None = None) -> Score:
    return Score(
        code=code,
        value=round(value, 3),
        threshold=threshold,
        alarm=value >= threshold,
        where=where,
        message=message,
        source=source,
    )


def _logit(share: float) -> float:
    inside = min(max(share, 1e-6), 1 - 1e-6)
    return math.log(inside / (1 - inside))

"""What the literature says against a composition before it is made: advice, each with a stable code and its source.

small-base-for-a-prompt     a soft prompt on a base under a billion parameters
bottlenecks-add-latency     networks that run one after another between the layers
low-rank-for-its-shift      rank 4 or less, and a change that is large beside the weights it changes
several-at-full-weight      two adapters or more summed at weight 1 on the same weights
few-training-examples       the adapter's card says that it was trained on a few hundred examples

Advice never refuses anything: it goes along with plans, publications and records. A threshold that the source does not
give is this project's, and its name here begins with OUR.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from composer.adapters import Adapter
from composer.bottlenecks import Bottlenecks
from composer.checkpoint import Checkpoint
from composer.deltas import LowRank
from composer.errors import TypedError
from composer.plan import Plan, Term, make_plan
from composer.quantised import QuantisedTensor
from composer.recipe import Placement, Recipe
from composer.tensors import DTYPES, TensorSpec
from registry.schemas import Advice

__all__ = ["adapter_advice", "plan_advice", "training_examples"]

Change = tuple[TensorSpec | QuantisedTensor, LowRank]

ARXIV = "https://arxiv.org/abs/"
BILLION = 10**9
OUR_LOW_RANK, OUR_LARGE_SHIFT = 4, 0.05
OUR_FEW_EXAMPLES = 500
SAMPLED_TENSORS, SAMPLED_ROWS = 4, 64
SUMS = ("linear", "cat", "svd")
MAX_CARD_BYTES = 1 << 20
COUNT = r"(\d[\d,]*(?:\.\d+)?k?)"
EXAMPLES = r"(?:[\w-]+ )?(?:examples?|samples?|instances?|pairs|conversations|dialogues|rows)\b"
SAYINGS = (
    rf"\b(?:trained|fine-?tuned|tuned)\b[^.\n]{{0,80}}?\bon\b[^.\n]{{0,40}}?\b{COUNT}\s+{EXAMPLES}",
    rf"(?:\b|_)train(?:ing)?[ _](?:examples|samples|instances)\W{{1,6}}{COUNT}\b",
    rf"\bdataset_size:\s*{COUNT}\b",
)
COUNTS = tuple(re.compile(saying, re.IGNORECASE) for saying in SAYINGS)


def adapter_advice(
    label: str, adapter: Adapter, *, parameters: int | None = None, base: Checkpoint | None = None
) -> list[Advice]:
    """What can be said of an adapter before it is composed.

    parameters: of the base it was trained on, where that is known. base: that base, where it is at hand.
    """
    changes: list[Change] = []
    if base is not None:
        try:
            changes = _changes(make_plan(Recipe(base=label, untie=True), base, [Term(label, adapter, 1.0)]), 0)
        except TypedError:  # what does not compose is told when it is composed
            changes = []
    return _advice_on(label, adapter, parameters, changes)


def _advice_on(label: str, adapter: Adapter, parameters: int | None, changes: Sequence[Change]) -> list[Advice]:
    found: list[Advice] = []
    families = {addition.family: addition for addition in adapter.additions()}
    if "prompt" in families and parameters is not None and parameters < BILLION:
        message = (
            f"a soft prompt on {parameters / 1e6:,.0f} million parameters: prompt tuning comes near fine-tuning from "
            "about ten billion and is unreliable below one; a LoRA is likely to do better"
        )
        found.append(_advice("small-base-for-a-prompt", label, message, "2104.08691"))
    bottlenecks = families.get(Bottlenecks.family)
    if isinstance(bottlenecks, Bottlenecks):
        message = (
            f"{len(bottlenecks.items)} networks run one after another between the layers, on every token: 20 to 30% of "
            "latency at batch 1 on GPT-2 medium; 'registry bench' measures it here"
        )
        found.append(_advice("bottlenecks-add-latency", label, message, "2106.09685"))
    rank = adapter.signature.rank
    if rank is not None and rank <= OUR_LOW_RANK:
        shift = _relative_shift(changes)
        if shift is not None and shift >= OUR_LARGE_SHIFT:
            message = (
                f"rank {rank} carries a change of {shift:.0%} of the weights it is added to: changes that large have a "
                "much higher rank in full fine-tuning; a higher rank is likely to do better"
            )
            found.append(_advice("low-rank-for-its-shift", label, message, "2405.09673"))
    examples = training_examples(adapter.files.get("README.md"))
    if examples is not None and examples < OUR_FEW_EXAMPLES:
        message = (
            f"its card says that it was trained on {examples} examples: results on so few vary widely from seed to "
            "seed; evaluate it before use"
        )
        found.append(_advice("few-training-examples", label, message, "2006.05987"))
    return found


def plan_advice(plan: Plan) -> list[Advice]:
    """What can be said of a composition: of each adapter that counts, and of their sum."""
    parameters = sum(spec.nbytes // DTYPES[spec.dtype].itemsize for spec in plan.checkpoint.tensors.values())
    counted = {item.term for job in plan.jobs for item in job.deltas} | {item.term for item in plan.additions}
    found = [
        advice
        for index in sorted(counted)
        for advice in _advice_on(plan.terms[index].label, plan.terms[index].adapter, parameters, _changes(plan, index))
    ]
    full = _summed_at_full_weight(plan)
    if len(full) > 1:
        labels = ", ".join(term.label for term in full)
        message = (
            f"{len(full)} adapters are summed at full weight on the same tensors: they can destroy each other; weights "
            "that sum to about 1, or --method ties, keep more of each"
        )
        found.append(_advice("several-at-full-weight", labels, message, "2306.01708"))
    return found


def training_examples(card: Path | None) -> int | None:
    """How many examples a card says that its adapter was trained on, the least where it says several; None if none."""
    if card is None or not card.is_file():
        return None
    text = card.read_bytes()[:MAX_CARD_BYTES].decode("utf-8", "replace")
    counts = [_number(match[1]) for pattern in COUNTS for match in pattern.finditer(text)]
    return min(counts, default=None)


def _number(text: str) -> int:
    thousands = text[-1:] in "kK"
    value = float(text.rstrip("kK").replace(",", ""))
    return round(value * 1000 if thousands else value)


def _summed_at_full_weight(plan: Plan) -> list[Term]:
    """The adapters of a plain sum whose weight is 1 or more on a tensor that another such adapter changes too."""
    if plan.recipe.method not in SUMS or plan.recipe.placement is not Placement.MERGED:
        return []
    shared: Counter[int] = Counter()
    for job in plan.jobs:
        full = {item.term for item in job.deltas if abs(item.weight) >= 1 and not item.delta.replaces}
        if len(full) > 1:
            shared.update(full)
    return [plan.terms[index] for index in sorted(shared)]


def _changes(plan: Plan, term: int) -> list[Change]:
    """The low-rank changes of one adapter, each with where the base's tensor lies."""
    return [
        (job.source, item.delta)
        for job in plan.jobs
        for item in job.deltas
        if item.term == term and isinstance(item.delta, LowRank)
    ]


def _relative_shift(changes: Sequence[Change]) -> float | None:
    """‖ΔW‖ / ‖W‖ (Frobenius) over a sample of rows of a few tensors; None where there are none."""
    change = weight = 0.0
    for source, delta in changes[:: max(1, len(changes) // SAMPLED_TENSORS)]:
        rows = source.shape[0]
        width = source.nbytes // rows
        stop = min(rows, SAMPLED_ROWS)
        raw = np.frombuffer(source.read_bytes(0, stop * width), DTYPES[source.dtype])
        values = raw.reshape(stop, -1).astype(np.float32)
        change += float(np.square(delta.load().rows(0, stop, values), dtype=np.float64).sum())
        weight += float(np.square(values, dtype=np.float64).sum())
    return (change / weight) ** 0.5 if weight else None


def _advice(code: str, label: str, message: str, paper: str) -> Advice:
    return Advice(code=code, adapter=label, message=message, source=f"{ARXIV}{paper}")

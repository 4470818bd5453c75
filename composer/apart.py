"""Adapters kept apart from the weights: which can be, and their factors as a graph multiplies with them.

    y = x·W + (x·A)·B     A [in, r], B [r, out], float32; the weight and the scale (alpha / r, alpha / √r) are in B

separate   one graph, and a file for each adapter that a session activates for all of its rows
multi      one graph that holds all of them, and a number for each row of a batch that says whose it is

The merged weights are the base's own. What is no product of two factors beside a linear layer cannot be kept so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from composer.adapters.adalora import SingularFactors
from composer.deltas import LowRank, Replace
from composer.deltas_dora import Dora, ScaledVector
from composer.deltas_experts import ExpertLowRank, ExpertSlice
from composer.deltas_residual import Residual
from composer.errors import IncompatibleError, RecipeError, UnsupportedAdapterError
from composer.plan import Plan, TensorJob, Term, WeightedDelta
from composer.recipe import Export, Recipe
from composer.tensors import DTYPES

__all__ = ["ApartAdapter", "adapter_names", "check_placement", "keep_apart", "load_factors", "rank_of"]

REASONS = {
    Dora: "DoRA divides by the norm of the changed weight, which is no sum",
    ScaledVector: "lora_bias changes a bias, which has no factors",
    Replace: "it carries whole tensors (modules_to_save or trained biases)",
    ExpertLowRank: "it changes experts, which see only the tokens that are routed to them",
    ExpertSlice: "it changes experts, which see only the tokens that are routed to them",
    Residual: "its start (PiSSA, OLoRA) changes the base's weight too",
}


@dataclass(frozen=True, slots=True)
class ApartAdapter:
    """One adapter of a plan: the name that it is activated by, its term, and its deltas with their jobs."""

    name: str
    term: int
    deltas: tuple[tuple[TensorJob, WeightedDelta], ...]


def check_placement(recipe: Recipe) -> None:
    """Raise RecipeError where a recipe keeps adapters apart and asks for what is done to merged weights."""
    wanted: dict[str, Any] = {"export": Export.ONNX.value, "method": "linear", "requantise": False}
    found = {"export": recipe.export.value, "method": recipe.method, "requantise": recipe.requantise}
    if found != wanted:
        raise RecipeError(
            f"adapters are kept apart ({recipe.placement}) in an ONNX graph, each by itself",
            expected=wanted,
            found=found,
            remedy="export onnx without a method, or merge",
        )


def keep_apart(plan: Plan) -> Plan:
    """The plan of the base alone, with its adapters beside the weights.

    Raises RecipeError (no adapter, an adapter of weight 0),
    UnsupportedAdapterError for a delta that is no pair of factors of a linear layer, or IncompatibleError for what
    changes the base itself.
    """
    for item in plan.additions:
        raise _refuse(plan.terms[item.term], f"it adds to the model ({item.addition.summary})", item.addition.family)
    if plan.layers or plan.vocabulary:
        raise IncompatibleError(
            "adapters that change the base itself cannot be kept apart from it",
            expected="no replicated layers and no resized vocabulary",
            found=plan.config_changes,
            remedy="merge the adapter that asks for it, and keep the others apart from the result",
        )
    kept: list[list[tuple[TensorJob, WeightedDelta]]] = [[] for _ in plan.terms]
    for job in plan.jobs:
        for item in job.deltas:
            _check_delta(plan.terms[item.term], job, item)
            kept[item.term].append((job, item))
    if idle := [term.label for term, deltas in zip(plan.terms, kept, strict=True) if not deltas]:
        raise RecipeError(
            f"{idle[0]} has a weight of 0: there is nothing to keep apart",
            expected="weights other than 0",
            found=idle,
            remedy="leave it out",
        )
    if not kept:
        raise RecipeError(
            f"there is no adapter to keep apart ({plan.recipe.placement})",
            expected="at least one adapter",
            found=str(plan.recipe),
            remedy="add one, or leave the option out",
        )
    names = adapter_names([term.label for term in plan.terms])
    shards = tuple(replace(shard, jobs=tuple(replace(job, deltas=()) for job in shard.jobs)) for shard in plan.shards)
    apart = tuple(ApartAdapter(names[index], index, tuple(deltas)) for index, deltas in enumerate(kept))
    return replace(plan, shards=shards, apart=apart)


def adapter_names(labels: Sequence[str]) -> list[str]:
    """A short name for each label: ``team/shout@1.0.0`` is shout; one that is taken gets a number, shout-2."""
    names: list[str] = []
    taken: Counter[str] = Counter()
    for label in labels:
        short = label.partition("@")[0].rstrip("/").rpartition("/")[2].lstrip(".") or "adapter"
        name, number = short, 1
        while taken[name]:
            number += 1
            name = f"{short}-{number}"
        taken[name] += 1
        names.append(name)
    return names


def rank_of(item: WeightedDelta) -> int:
    """The rank of its factors; of one that was pruned to nothing it is 1, of zeros."""
    return max(1, item.delta.a.shape[0])


def load_factors(job: TensorJob, item: WeightedDelta) -> tuple[np.ndarray, np.ndarray]:
    """A [in, r] and B [r, out] of one delta, float32, C-contiguous.

    Raises TargetMismatchError when the adapter carries a copy of another base's weight.
    """
    delta = item.delta.load()
    if delta.copy is not None:
        width = job.source.nbytes // job.matrix[0]
        for start, stop in job.blocks:
            raw = job.source.read_bytes(start * width, stop * width)
            base = np.frombuffer(raw, DTYPES[job.source.dtype]).reshape(stop - start, -1)
            delta.check_base(start, stop, base.astype(np.float32))
    left, right = (delta.left, delta.right) if item.delta.transposed else (delta.right.T, delta.left.T)
    scale = np.float32(float(delta.scale) * item.weight)
    return np.ascontiguousarray(left), np.ascontiguousarray(right * scale)


def _check_delta(term: Term, job: TensorJob, item: WeightedDelta) -> None:
    delta = item.delta
    factors = isinstance(delta, LowRank | SingularFactors) and getattr(delta, "plain", True)
    if factors and not getattr(delta, "embedding", False) and job.name.endswith(".weight") and len(job.shape) == 2:
        return
    kind = term.adapter.signature.kind
    reason = next((why for type_, why in REASONS.items() if isinstance(delta, type_)), None)
    if factors:
        reason = "its factors are of an embedding, a convolution or a stack of experts"
    raise _refuse(
        term, f"{job.name}: {reason or f'{kind} is no product of two factors'}", f"{kind}: {type(delta).__name__}"
    )


def _refuse(term: Term, reason: str, found: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"{term.label} cannot be kept apart from the weights: {reason}",
        expected="low-rank factors of linear layers: LoRA (with rsLoRA, patterns, Conv1D) and AdaLoRA",
        found=found,
        remedy="merge it: leave --separate and --multi out",
    )

"""Uni-LoRA: a LoRA whose every number is one of a few, scaled (arXiv:2506.00799; peft/tuners/unilora/layer.py).

base_model.unilora_theta_d [d]
base_model.model.<module>.unilora_indices_A [r, in], unilora_indices_B [out, r]     places in θ
                          unilora_scales_A [r, in], unilora_scales_B [out, r]

A = θ[indices_A] ⊙ scales_A     B = θ[indices_B] ⊙ scales_B     W += B·A
Without save_indices the file holds θ alone, and the places follow from the order of the modules in PEFT's model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts, low_rank
from composer.deltas import BlockDelta, read_array

__all__ = ["Unilora"]

THETA = "unilora_theta_d"
SIDES = ("A", "B")


@adapter_kind
class Unilora(ModuleKind):
    """Low-rank deltas out of one vector on linear (and Conv1D) weights."""

    name = "unilora"
    peft_types = ("UNILORA",)
    integers = tuple(f"unilora_indices_{side}" for side in SIDES)
    parts = (*integers, *(f"unilora_scales_{side}" for side in SIDES))
    shared = (THETA,)
    saved: ClassVar = {"save_indices": "its places follow from the order in which PEFT finds the modules of its model"}

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        shapes = {name: spec.shape for name, spec in parts.items()}
        a, b = (shapes[f"unilora_indices_{side}"] for side in SIDES)
        integers = all(parts[name].dtype[0] == "I" for name in self.integers)
        fits = integers and len(a) == len(b) == 2 and a[0] == b[1] and 0 not in (*a, *b) and len(shapes[THETA]) == 1
        if not fits or any(shapes[f"unilora_scales_{side}"] != shapes[f"unilora_indices_{side}"] for side in SIDES):
            found = {name: list(shape) for name, shape in shapes.items()}
            raise damaged(f"{module}: the parts of Uni-LoRA do not fit", "A [r, in] and B [out, r], θ [d]", found)
        return (b[0], a[1])

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        theta = read_array(parts[THETA])
        factors = {}
        for side in SIDES:
            places = parts[f"unilora_indices_{side}"].read().astype(np.int64)
            if places.min() < 0 or places.max() >= len(theta):
                found = [int(places.min()), int(places.max())]
                raise damaged(f"unilora_indices_{side}: places outside θ", f"0 to {len(theta) - 1}", found)
            factors[side] = theta[places] * read_array(parts[f"unilora_scales_{side}"])
        return low_rank(factors["B"], factors["A"])

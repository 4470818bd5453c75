"""RoAd: rotations and scales of pairs of outputs (arXiv:2409.00119; peft/tuners/road/layer.py).

base_model.model.<module>.road_theta, road_alpha [out / 2], [out] or [2·out]    variants road_1, road_2, road_4

Within each group of group_size outputs, the first half h₁ is paired with the second half h₂:
h₁' = c·h₁ − s·h₂, h₂' = c·h₂ + s·h₁, with c = α·cos θ and s = α·sin θ; the bias turns with the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts
from composer.deltas import BlockDelta, read_array

__all__ = ["Road"]

NUMBERS = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # for each output


@dataclass(frozen=True, slots=True)
class LoadedPairs:
    """c and s [groups, 2, group_size / 2, 1], float32."""

    cosine: np.ndarray
    sine: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        grouped = base.reshape(*self.cosine.shape[:3], -1)
        turned = np.stack([-grouped[:, 1], grouped[:, 0]], axis=1)
        return (grouped * self.cosine + turned * self.sine).reshape(base.shape) - base


@adapter_kind
class Road(ModuleKind):
    """Rotations of the outputs of linear layers."""

    name = "road"
    peft_types = ("ROAD",)
    parts = ("road_theta", "road_alpha")
    mixes_rows = True
    changes_bias = True

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        theta, alpha = (parts[name].shape for name in self.parts)
        variant, group = config.get("variant"), config.get("group_size")
        fits = variant in NUMBERS and type(group) is int and group > 0 and not group % 2 and theta == alpha
        outputs = theta[0] / NUMBERS[variant] if fits and len(theta) == 1 else 0
        if not outputs or outputs % group:
            found = {"variant": variant, "group_size": group, "theta": list(theta), "alpha": list(alpha)}
            raise damaged(f"{module}: the parts of RoAd do not fit", "theta and alpha as the variant says", found)
        return (int(outputs), ANY_SIZE)

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        half = config["group_size"] // 2
        theta, alpha = (read_array(parts[name]) for name in self.parts)
        cosine, sine = alpha * np.cos(theta), alpha * np.sin(theta)
        if config["variant"] == "road_1":
            cosine, sine = (np.repeat(x.reshape(-1, 1, half), 2, axis=1) for x in (cosine, sine))
        elif config["variant"] == "road_4":
            cosine, sine = cosine.reshape(-1, 2, 2 * half)[:, 0], sine.reshape(-1, 2, 2 * half)[:, 1]
        shape = (-1, 2, half, 1)
        return LoadedPairs(cosine.reshape(shape), sine.reshape(shape))

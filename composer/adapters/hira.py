"""HiRA: the weight times a low-rank matrix, number by number (OpenReview TwJrTz9cRS; peft/tuners/hira/layer.py).

base_model.model.<module>.hira_A [r, in]    hira_B [out, r]

W' = W + W ⊙ (B·A)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts
from composer.deltas import BlockDelta, read_array
from composer.product import product

__all__ = ["Hira"]


@dataclass(frozen=True, slots=True)
class LoadedHadamard:
    """W ⊙ (left [out, r] · right [r, in]), float32."""

    left: np.ndarray
    right: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        return product(self.left[start:stop], self.right) * base


@adapter_kind
class Hira(ModuleKind):
    """Low-rank factors of linear (and Conv1D) weights."""

    name = "hira"
    peft_types = ("HIRA",)
    parts = ("hira_A", "hira_B")

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        a, b = (parts[name].shape for name in self.parts)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
            raise damaged(f"{module}: the parts of HiRA do not fit", "A [r, in] and B [out, r]", [list(a), list(b)])
        return (b[0], a[1])

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        return LoadedHadamard(read_array(parts["hira_B"]), read_array(parts["hira_A"]))

"""OSF: the smallest singular components of the weight, trained (arXiv:2504.07097; peft/tuners/osf/layer.py).

base_model.model.<module>.osf_svd_params.U_low [out, k]   .S_low [k]   .V_low [k, in]

W' = W − W_k + U·diag(S)·V     W_k: what the k smallest singular values of W make up, computed from the base
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts, unfit
from composer.adapters._svd import SCRATCH, smallest_part
from composer.deltas import BlockDelta, read_array
from composer.product import product

__all__ = ["LoadedExchange", "Osf"]


@dataclass(frozen=True, slots=True)
class LoadedExchange:
    """scale · left [out, r]·right [r, in] in place of the `count` smallest singular components of W; float32."""

    kind: str
    left: np.ndarray
    right: np.ndarray
    scale: np.float32
    count: int

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """All rows: singular vectors know no blocks."""
        if self.count > min(base.shape):
            raise unfit(self.kind, f"at least {self.count} rows and columns", list(base.shape))
        return product(self.left, self.right) * self.scale - smallest_part(base, self.count)


@adapter_kind
class Osf(ModuleKind):
    """Trained low singular subspaces of linear weights."""

    name = "osf"
    peft_types = ("OSF",)
    parts = ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low")
    mixes_rows = True
    scratch = SCRATCH

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        left, values, right = (parts[name].shape for name in self.parts)
        fits = len(left) == len(right) == 2 and len(values) == 1 and left[1] == right[0] == values[0]
        if not fits or 0 in (*left, *right):
            found = [list(left), list(values), list(right)]
            raise damaged(f"{module}: the parts of OSF do not fit", "U [out, k], S [k] and V [k, in]", found)
        return (left[0], right[1])

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        left, values, right = (read_array(parts[name]) for name in self.parts)
        return LoadedExchange(self.name, left * values, right, np.float32(1), len(values))

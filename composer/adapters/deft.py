"""DEFT: a subspace of the outputs is projected away and written anew (peft/tuners/deft/layer.py).

base_model.model.<module>.deft_P [out, r]    deft_R [r, in], which para=true leaves out

W' = W + Q·(s·R − Zᵀ·W)     s = alpha / r where alpha is set, else 1
decomposition_method "relu": Q = P, Z = max(P, 0)     "qr": Q = Z = the orthogonal factor of P
With para (PaRa) nothing is written: W' = W − Q·Zᵀ·W
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts, check_number
from composer.deltas import BlockDelta, read_array
from composer.product import product

__all__ = ["Deft"]


@dataclass(frozen=True, slots=True)
class LoadedProjection:
    """written [out, r], removed [out, r] and the injection [r, in] or None, float32."""

    written: np.ndarray
    removed: np.ndarray
    injection: np.ndarray | None

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """All rows: Zᵀ·W sums over the outputs."""
        change = -(self.removed.T @ base)
        if self.injection is not None:
            change += self.injection
        return product(self.written, change)


@adapter_kind
class Deft(ModuleKind):
    """Replaced subspaces of the outputs of linear (and Conv1D) weights."""

    name = "deft"
    peft_types = ("DEFT",)
    parts = ("deft_P", "deft_R")
    optional = ("deft_R",)
    mixes_rows = True
    options: ClassVar = {"decomposition_method": ("relu", "qr"), "para": (False, True, None)}

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        if config.get("alpha") is not None:
            check_number(config, "alpha")
        shapes = {name: spec.shape for name, spec in parts.items()}
        p, r = shapes["deft_P"], shapes.get("deft_R")
        fits = len(p) == 2 and 0 < p[1] <= p[0] and bool(config.get("para")) == (r is None)
        if not fits or (r is not None and (len(r) != 2 or r[0] != p[1] or not r[1])):
            found = {name: list(shape) for name, shape in shapes.items()}
            raise damaged(f"{module}: the parts of DEFT do not fit", "P [out, r] and, without para, R [r, in]", found)
        return (p[0], ANY_SIZE if r is None else r[1])

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        p = read_array(parts["deft_P"])
        written, removed = p, np.maximum(p, 0)
        if config.get("decomposition_method") == "qr":
            # Householder's signs, as in PEFT: R was trained for them. In float32, as there.
            written = removed = np.linalg.qr(p)[0]
        if "deft_R" not in parts:
            return LoadedProjection(written, removed, None)
        scale = np.float32(config["alpha"] / p.shape[1]) if config.get("alpha") else np.float32(1)
        return LoadedProjection(written, removed, read_array(parts["deft_R"]) * scale)

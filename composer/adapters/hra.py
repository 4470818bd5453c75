"""HRA: a chain of Householder reflections of the inputs (arXiv:2405.17484; peft/tuners/hra/layer.py).

base_model.model.<module>.hra_u [in, r]

W' = W·∏ᵢ(I − 2uᵢuᵢᵀ)     u normalised; with apply_GS orthonormalised first (Gram–Schmidt)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts
from composer.deltas import BlockDelta, read_array
from composer.errors import NonFiniteError

__all__ = ["Hra", "LoadedReflections"]


@dataclass(frozen=True, slots=True)
class LoadedReflections:
    """Unit vectors [r, in], float32, applied one after another."""

    vectors: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        reflected = base.copy()
        for vector in self.vectors:
            reflected -= np.outer(2 * (reflected @ vector), vector)
        return reflected - base


@adapter_kind
class Hra(ModuleKind):
    """Reflections of the inputs of linear weights."""

    name = "hra"
    peft_types = ("HRA",)
    parts = ("hra_u",)
    options: ClassVar = {"apply_GS": (False, True)}

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        found = parts["hra_u"].shape
        if len(found) != 2 or 0 in found or found[1] != config.get("r"):
            raise damaged(f"{module}: the parts of HRA do not fit", f"hra_u [in, {config.get('r')}]", list(found))
        return (ANY_SIZE, found[0])

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        vectors = read_array(parts["hra_u"]).astype(np.float64).T
        if config.get("apply_GS"):
            kept: list[np.ndarray] = []
            for vector in vectors:
                rest = vector
                for unit in kept:
                    rest = rest - (unit @ rest) * unit
                kept.append(_unit(rest, parts))
            # Reflections along orthonormal vectors commute: their product is I − 2UUᵀ.
            return LoadedReflections(np.array(kept, np.float32))
        return LoadedReflections(np.array([_unit(vector, parts) for vector in vectors], np.float32))


def _unit(vector: np.ndarray, parts: Parts) -> np.ndarray:
    norm = float(np.linalg.norm(vector))
    if norm == 0:
        raise NonFiniteError(
            f"{parts['hra_u'].name}: a reflection along the zero vector is not defined",
            expected="vectors other than 0",
            found=0,
            remedy="the training diverged: publish an earlier step",
            tensor=parts["hra_u"].name,
        )
    return vector / norm

"""DeLoRA: LoRA with normalised ranks and a bound on its strength (arXiv:2503.18225; peft/tuners/delora/layer.py).

base_model.model.<module>.delora_A [r, in]    delora_B [out, r]    delora_lambda [1]    delora_w_norm [in]

W += B·diag(λ / (r·‖Aᵢ‖·‖Bᵢ‖))·A ⊙ w_norm     norms not below 1e-4; w_norm, the base's own, is in the file
"""

from __future__ import annotations

from typing import Any

import numpy as np

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts, low_rank
from composer.deltas import BlockDelta, read_array

__all__ = ["Delora"]

LEAST_NORM = 1e-4


@adapter_kind
class Delora(ModuleKind):
    """Bounded low-rank deltas on linear weights."""

    name = "delora"
    peft_types = ("DELORA",)
    parts = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        a, b, strength, norm = (parts[name].shape for name in self.parts)
        fits = len(a) == len(b) == 2 and a[0] == b[1] and 0 not in (*a, *b)
        if not fits or strength not in ((1,), ()) or norm != a[1:]:
            found = [list(a), list(b), list(strength), list(norm)]
            raise damaged(
                f"{module}: the parts of DeLoRA do not fit", "A [r, in], B [out, r], λ [1], w_norm [in]", found
            )
        return (b[0], a[1])

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        a, b, strength, norm = (read_array(parts[name]).astype(np.float64) for name in self.parts)
        lengths = [np.maximum(np.linalg.norm(x, axis=axis), LEAST_NORM) for x, axis in ((a, 1), (b, 0))]
        scale = strength.ravel()[0] / len(a) / (lengths[0] * lengths[1])
        return low_rank(b, scale[:, None] * a * norm)

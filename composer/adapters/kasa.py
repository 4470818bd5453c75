"""KaSA: a LoRA with singular values, in place of the base's smallest ones (arXiv:2412.06071; peft/tuners/lora).

base_model.model.<module>.lora_A.weight [r, in]   lora_diag [r]   lora_B.weight [out, r]     with kasa_config

W' = W − W_r + s·B·diag(lora_diag)·A     s as in LoRA; W_r: what the r smallest singular values of W make up
"""

from __future__ import annotations

from typing import Any

import numpy as np

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._lora_config import lora_scale
from composer.adapters._lora_parts import A, B, LoraVariant, pair_shape
from composer.adapters._modules import Parts
from composer.adapters._svd import SCRATCH
from composer.adapters.osf import LoadedExchange
from composer.deltas import BlockDelta, read_array

__all__ = ["Kasa"]

DIAGONAL = "lora_diag"


@adapter_kind
class Kasa(LoraVariant):
    """Low-rank deltas on linear weights cut down by as many ranks."""

    name = "kasa"
    switches = ("kasa_config",)
    parts = (A, B, DIAGONAL)
    mixes_rows = True
    scratch = SCRATCH

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        shape = pair_shape(parts)
        if shape is None or parts[DIAGONAL].shape != parts[A].shape[:1] or parts[A].shape[0] >= min(shape):
            found = {name: list(spec.shape) for name, spec in parts.items()}
            expected = "A [r, in], lora_diag [r] and B [out, r], with r below both sizes"
            raise damaged(f"{module}: the parts of KaSA do not fit", expected, found)
        return shape

    def build_module(self, config: dict[str, Any], module: str, parts: Parts) -> BlockDelta:
        a, b, diagonal = (read_array(parts[name]) for name in self.parts)
        scale = np.float32(lora_scale(config, module, len(a)))
        return LoadedExchange(self.name, b * diagonal, a, scale, len(a))

"""BEFT: only biases change (arXiv:2509.15974; peft/tuners/beft/layer.py).

base_model.model.<module>.beft_bias [1, out]

b += beft_bias     a base without that bias cannot hold it
"""

from __future__ import annotations

from typing import Any

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts
from composer.deltas import BlockDelta, read_array
from composer.deltas_dora import LoadedScaledVector

__all__ = ["Beft"]


@adapter_kind
class Beft(ModuleKind):
    """Vectors that are added to the biases of linear layers."""

    name = "beft"
    peft_types = ("BEFT",)
    parts = ("beft_bias",)
    parameter = "bias"

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        found = parts["beft_bias"].shape
        if len(found) != 2 or found[0] != 1 or not found[1]:
            raise damaged(f"{module}: the parts of BEFT do not fit", "beft_bias [1, out]", list(found))
        return found[1:]

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        return LoadedScaledVector(read_array(parts["beft_bias"]).ravel())

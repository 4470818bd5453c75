"""BOFT: rotations of the inputs and a factor for each output (arXiv:2311.06243; peft/tuners/boft/layer.py).

base_model.model.<module>.boft_R [1, in / b, b, b]    boft_s [out, 1]

W' = W·Rᵀ ⊙ s     R = (I − Q)(I + Q)⁻¹ by blocks, Q = (boft_R − boft_Rᵀ) / 2
A first size above 1 (boft_n_butterfly_factor, which PEFT has on CUDA only) is refused.
"""

from __future__ import annotations

from typing import Any

from composer.adapters import adapter_kind, refuse
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts
from composer.adapters._rotations import LoadedRotation, cayley
from composer.deltas import BlockDelta, read_array

__all__ = ["Boft"]


@adapter_kind
class Boft(ModuleKind):
    """Rotations of the inputs of linear weights, and scales of their outputs."""

    name = "boft"
    peft_types = ("BOFT",)
    parts = ("boft_R", "boft_s")

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        blocks, scale = parts["boft_R"].shape, parts["boft_s"].shape
        if len(blocks) != 4 or blocks[2] != blocks[3] or 0 in blocks or len(scale) != 2 or scale[1] != 1:
            expected = "boft_R [1, in / b, b, b] and boft_s [out, 1]"
            raise damaged(f"{module}: the parts of BOFT do not fit", expected, [list(blocks), list(scale)])
        if blocks[0] != 1:
            raise refuse(
                f"{module}: BOFT with {blocks[0]} butterfly factors is not supported",
                expected="boft_n_butterfly_factor=1",
                found=blocks[0],
                remedy="merge it with PEFT on a CUDA device",
            )
        return (scale[0], blocks[1] * blocks[2])

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        raw = read_array(parts["boft_R"])[0]
        blocks = cayley((raw - raw.swapaxes(1, 2)) / 2)
        return LoadedRotation(self.name, blocks, read_array(parts["boft_s"]))

"""BOFT: rotations of the inputs and a factor for each output (arXiv:2311.06243; peft/tuners/boft/layer.py).

base_model.model.<module>.boft_R [m, in / b, b, b]    boft_s [out, 1]

W' = W·R₀ᵀ·R₁ᵀ…·Rₘ₋₁ᵀ ⊙ s     Rᵢ = Pᵢ·blockdiag((I − Q)(I + Q)⁻¹)·Pᵢᵀ, Q = (boft_R[i] − boft_R[i]ᵀ) / 2
m is boft_n_butterfly_factor. Pᵢ is what makes it a butterfly: it cuts every 2ⁱ·b inputs into pieces of b / 2 and puts
the even pieces before the odd ones, so that P₀ changes nothing. PEFT itself has m > 1 on CUDA only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts
from composer.adapters._rotations import LoadedRotation, cayley, rotate
from composer.deltas import BlockDelta, read_array

__all__ = ["Boft"]


@dataclass(frozen=True, slots=True)
class LoadedButterfly:
    """Rotations, one after another: blocks [m, in / b, b, b] and the order of the inputs [m, in]; s [out, 1]."""

    blocks: np.ndarray
    orders: np.ndarray
    scale: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        rotated = base
        for blocks, order in zip(self.blocks, self.orders, strict=True):
            rotated = rotate(rotated[:, np.argsort(order)], blocks)[:, order]
        return rotated * self.scale[start:stop] - base


@adapter_kind
class Boft(ModuleKind):
    """Rotations of the inputs of linear weights, and scales of their outputs."""

    name = "boft"
    peft_types = ("BOFT",)
    parts = ("boft_R", "boft_s")

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        blocks, scale = parts["boft_R"].shape, parts["boft_s"].shape
        fits = len(blocks) == 4 and blocks[2] == blocks[3] and 0 not in blocks and len(scale) == 2 and scale[1] == 1
        if fits and blocks[0] > 1:
            fits = blocks[0] < 32 and blocks[2] % 2 == 0 and blocks[1] % 2 ** (blocks[0] - 1) == 0
        if not fits:
            expected = "boft_R [m, in / b, b, b] with in divisible by 2ᵐ⁻¹·b, and boft_s [out, 1]"
            raise damaged(f"{module}: the parts of BOFT do not fit", expected, [list(blocks), list(scale)])
        return (scale[0], blocks[1] * blocks[2])

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        raw, scale = read_array(parts["boft_R"]), read_array(parts["boft_s"])
        blocks = np.stack([cayley((factor - factor.swapaxes(1, 2)) / 2) for factor in raw])
        if len(blocks) == 1:
            return LoadedRotation(self.name, blocks[0], scale)
        width = blocks.shape[1] * blocks.shape[2]
        orders = [_order(width, blocks.shape[2] // 2, blocks.shape[2] << index) for index in range(len(blocks))]
        return LoadedButterfly(blocks, np.stack(orders), scale)


def _order(width: int, piece: int, span: int) -> np.ndarray:
    """The inputs [width] with the even pieces of each span before the odd ones."""
    pieces = np.arange(width).reshape(-1, span // piece, piece)
    return np.concatenate([pieces[:, ::2], pieces[:, 1::2]], axis=1).ravel()

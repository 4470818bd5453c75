"""OFT: an orthogonal rotation of the inputs in blocks (arXiv:2306.07280, 2506.19847; peft/tuners/oft/layer.py).

base_model.model.<module>.oft_R.weight [in / b, b(b − 1) / 2]    the upper triangles of skew-symmetric Q

W' = W·Rᵀ     R = I + 2Q + 2Q² + … + Qⁿ⁻¹ (the Neumann series of Cayley's transform), or (I − Q)(I + Q)⁻¹ itself
With block_share all inputs have one block; with coft Q is brought back to a norm of eps / √blocks first.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts
from composer.adapters._rotations import LoadedRotation, cayley
from composer.deltas import BlockDelta, read_array

__all__ = ["Oft"]

WEIGHT = "oft_R.weight"


@adapter_kind
class Oft(ModuleKind):
    """Rotations of the inputs of linear (and Conv1D) weights."""

    name = "oft"
    peft_types = ("OFT",)
    parts = (WEIGHT,)
    options: ClassVar = {"use_cayley_neumann": (True, False), "block_share": (False, True), "coft": (False, True)}

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        spec = parts[WEIGHT]
        size = _block_size(spec.shape[-1]) if len(spec.shape) == 2 else 0
        terms = config.get("num_cayley_neumann_terms", 5)
        if not size or 0 in spec.shape or type(terms) is not int or not 0 < terms < 1000:
            expected = "oft_R [blocks, b(b − 1) / 2] and a number of Neumann terms"
            raise damaged(f"{module}: the parts of OFT do not fit", expected, [list(spec.shape), terms])
        return (ANY_SIZE, ANY_SIZE if config.get("block_share") else spec.shape[0] * size)

    def conditions(self, config: dict[str, Any], parts: Parts) -> tuple[str, ...]:
        size = _block_size(parts[WEIGHT].shape[1])
        return (f"columns multiple of {size}",) if config.get("block_share") else ()

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        triangles = read_array(parts[WEIGHT])
        size = _block_size(triangles.shape[1])
        skew = np.zeros((len(triangles), size, size), np.float32)
        rows, columns = np.triu_indices(size, 1)
        skew[:, rows, columns] = triangles
        skew -= skew.swapaxes(1, 2)
        if config.get("coft"):
            skew = _constrained(skew, config.get("eps", 6e-5))
        exact = config.get("use_cayley_neumann", True) is False
        terms = config.get("num_cayley_neumann_terms", 5)
        blocks = cayley(skew) if exact else neumann(skew, terms)
        # PEFT multiplies the inputs by R; for the weight that is W·Rᵀ
        return LoadedRotation(self.name, blocks, shared=bool(config.get("block_share")))


def neumann(skew: np.ndarray, terms: int) -> np.ndarray:
    """I + 2Q + 2Q² + … + Qⁿ⁻¹ for n terms: as PEFT, the last power counts once, and 3 terms go as far as 4."""
    blocks = np.broadcast_to(np.eye(skew.shape[-1], dtype=np.float32), skew.shape).copy()
    if terms > 1:
        blocks += 2 * skew
    if terms > 2:
        power = skew @ skew
        blocks += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            blocks += 2 * power
        blocks += power @ skew
    return blocks


def _constrained(skew: np.ndarray, eps: float) -> np.ndarray:
    """Blocks whose norm exceeds eps / √blocks, scaled back to it."""
    limit = eps / math.sqrt(len(skew))
    norm = np.sqrt(np.square(skew, dtype=np.float64).sum(axis=(1, 2), keepdims=True))
    return np.where(norm <= limit, skew, skew * (limit / np.maximum(norm, limit))).astype(np.float32)


def _block_size(count: int) -> int:
    """b of b(b − 1) / 2 numbers; 0 when there is none."""
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    return size if size * (size - 1) // 2 == count else 0

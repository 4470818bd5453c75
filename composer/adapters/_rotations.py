"""Rotations of the inputs: W' = W·Rᵀ with R block-diagonal, which OFT and BOFT share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from composer.adapters._modules import unfit

__all__ = ["LoadedRotation", "cayley", "rotate"]


@dataclass(frozen=True, slots=True)
class LoadedRotation:
    """W·Rᵀ ⊙ s − W: blocks [in / b, b, b] of R, or one that all share; s [out, 1] or 1. Float32."""

    kind: str
    blocks: np.ndarray
    scale: np.ndarray | None = None
    shared: bool = False

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        count, size, _ = self.blocks.shape
        width = base.shape[1]
        if width % size or (not self.shared and width != count * size):
            raise unfit(self.kind, f"inputs of {count} blocks of {size}", width)
        rotated = rotate(base, self.blocks)
        if self.scale is not None:
            rotated *= self.scale[start:stop]
        return rotated - base


def rotate(rows: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """rows [n, in] times Rᵀ, with R the block diagonal of blocks [in / b, b, b], or of one block again and again."""
    grouped = rows.reshape(len(rows), -1, blocks.shape[1]).swapaxes(0, 1)
    return (grouped @ blocks.swapaxes(1, 2)).swapaxes(0, 1).reshape(rows.shape)


def cayley(skew: np.ndarray) -> np.ndarray:
    """(I − Q)(I + Q)⁻¹ of skew-symmetric Q [blocks, b, b], solved in float64."""
    identity = np.eye(skew.shape[-1])
    q = skew.astype(np.float64)
    # X·(I + Q) = I − Q; transposed, with Qᵀ = −Q, that is (I − Q)·Xᵀ = I + Q
    return np.linalg.solve(identity - q, identity + q).swapaxes(1, 2).astype(np.float32)

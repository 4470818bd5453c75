"""What LoRA's variants change besides the plain product.

Dora          W  = m / ‖V‖ · V,  V = W + scale · B·A     norms over the inputs, one for each output
ScaledVector  b += scale · b_B                           the bias on lora_B
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from composer.deltas import LoadedLowRank, LowRank, read_array
from composer.errors import NonFiniteError
from composer.tensors import TensorSpec

__all__ = ["Dora", "LoadedDora", "LoadedScaledVector", "ScaledVector"]


@dataclass(frozen=True, slots=True)
class Dora:
    """m / ‖V‖ · V − W with V = W + scale · B·A and m `magnitude` [out], float32.

    Source: arXiv:2402.09353 eq. 5; PEFT's tuners/lora/dora.py, which takes the norms of the unmerged base's V.
    A weight w of a recipe gives W + w·(W' − W).
    """

    low_rank: LowRank
    magnitude: TensorSpec
    replaces: bool = False

    @property
    def target(self) -> str:
        return self.low_rank.target

    @property
    def transposed(self) -> bool:
        """Whether the base keeps W as [in, out]."""
        return self.low_rank.transposed

    @property
    def embedding(self) -> bool:
        """Whether W is an embedding [V, d]; the magnitudes are then [d]."""
        return self.low_rank.embedding

    @property
    def whole(self) -> bool:
        # An output is a column of [in, out], so its norm needs every row.
        return self.low_rank.transposed

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (*self.low_rank.sources, self.magnitude)

    def load(self) -> LoadedDora:
        return LoadedDora(self.low_rank.load(), read_array(self.magnitude), self.transposed, self.target)


@dataclass(frozen=True, slots=True)
class LoadedDora:
    """The factors and magnitudes [out] in memory, float32."""

    low_rank: LoadedLowRank
    magnitude: np.ndarray
    transposed: bool
    target: str

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """W' − W; raises NonFiniteError where V has an output whose norm is zero (or not finite)."""
        direction = base + self.low_rank.rows(start, stop, base)
        axis = 0 if self.transposed else 1
        norm = np.sqrt(np.square(direction).sum(axis=axis, dtype=np.float64, keepdims=True))
        if not (np.isfinite(norm) & (norm > 0)).all():
            raise NonFiniteError(
                f"{self.target}: the norm of W + s·B·A is zero or not finite for some output, DoRA divides by it",
                expected="positive finite norms",
                found=int((~(np.isfinite(norm) & (norm > 0))).sum()),
                remedy="compose the adapter with the base that it was trained on",
                tensor=self.target,
            )
        magnitude = self.magnitude[None, :] if self.transposed else self.magnitude[start:stop, None]
        return direction * (magnitude / norm).astype(np.float32) - base


@dataclass(frozen=True, slots=True)
class ScaledVector:
    """scale · vector, added to a base tensor of the same shape [out]."""

    target: str
    vector: TensorSpec
    scale: float
    replaces: bool = False
    whole: bool = False

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (self.vector,)

    def load(self) -> LoadedScaledVector:
        return LoadedScaledVector(read_array(self.vector) * np.float32(self.scale))


@dataclass(frozen=True, slots=True)
class LoadedScaledVector:
    """The scaled vector in memory, float32 [out]."""

    vector: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        return self.vector[start:stop].reshape(base.shape).copy()

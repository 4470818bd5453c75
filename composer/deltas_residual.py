"""LoRA that starts from the base's own weights: PiSSA and OLoRA train beside what is left of W, not beside W.

    R  = W − W₀, rounded to the base's number format       W' = R + s·B·A
    PiSSA   W₀ = the best approximation of W at the rank of the adapter       (its start, s·B₀·A₀, is that)
    OLoRA   W₀ = s·Q_r·R_r of the QR decomposition: s times the projection onto the span of W's first r columns

Neither R nor W₀ is saved. PEFT recomputes them from the base when it loads such an adapter, and so does this.
Sources: arXiv:2404.02948, arXiv:2406.01775; PEFT's tuners/lora/layer.py, pissa_init and olora_init.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np

from composer.deltas import BlockDelta, LowRank
from composer.deltas_dora import Dora
from composer.errors import UnsupportedAdapterError
from composer.factors import leading
from composer.quantised import QuantisedTensor
from composer.tensors import DTYPES, TensorSpec

__all__ = ["LoadedResidual", "Residual", "Start"]

Start = Literal["pissa", "olora"]
# A decomposition takes several times the memory of its matrix, and all cores
ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, slots=True)
class Residual:
    """W' − W of a LoRA or DoRA that was trained beside the residual R; `dtype` is the base's, known once `placed`."""

    trained: LowRank | Dora
    start: Start
    rank: int
    scale: float
    dtype: str = "F32"
    replaces: bool = False
    whole: bool = True  # W₀ is of the whole matrix

    @property
    def target(self) -> str:
        return self.trained.target

    @property
    def transposed(self) -> bool:
        """Whether the base keeps W as [in, out]."""
        return self.trained.transposed

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return self.trained.sources

    def scratch_bytes(self, rows: int, columns: int) -> int:
        """Held while W₀ is computed: float64 copies of W and its parts, the smaller Gram matrix and its vectors."""
        return 8 * (4 * rows * columns + 5 * min(rows, columns) ** 2)

    def placed(self, source: TensorSpec | QuantisedTensor) -> Residual:
        """The same for a base whose tensor is `source`. Raises UnsupportedAdapterError where that is quantised.

        PEFT refuses PiSSA there, and with OLoRA rounds the residual to the quantised format again.
        """
        if isinstance(source, QuantisedTensor):
            raise UnsupportedAdapterError(
                f"{self.target} is quantised: what {self.start} leaves of it depends on how it is quantised again",
                expected="a base in bf16, fp16 or fp32",
                found="a quantised base",
                remedy="convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)",
            )
        return Residual(self.trained, self.start, self.rank, self.scale, source.dtype)

    def load(self) -> LoadedResidual:
        return LoadedResidual(self.trained.load(), self.start, self.rank, self.scale, self.dtype)


@dataclass(frozen=True, slots=True)
class LoadedResidual:
    """The trained change in memory."""

    trained: BlockDelta
    start: Start
    rank: int
    scale: float
    dtype: str

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        with ONE_AT_A_TIME:
            first = _principal(base, self.rank) if self.start == "pissa" else _projected(base, self.rank, self.scale)
            left = (base - first).astype(DTYPES[self.dtype]).astype(np.float32)
        return self.trained.rows(start, stop, left) + (left - base)


def _principal(weight: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation at `rank`, float64, of [rows, columns]; that of the transpose is its transpose."""
    left, right, *_ = leading(weight.astype(np.float64), rank=rank)
    return left @ right


def _projected(weight: np.ndarray, rank: int, scale: float) -> np.ndarray:
    """scale · Q·Qᵀ·W, float64, with Q the orthonormal basis of the first `rank` columns."""
    wide = weight.astype(np.float64)
    basis = np.linalg.qr(wide[:, :rank])[0]
    return scale * (basis @ (basis.T @ wide))

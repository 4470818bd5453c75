"""The hot loop: one block of a tensor, float32 accumulation, one rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from composer.deltas import torch_dtype
from composer.errors import NonFiniteError

if TYPE_CHECKING:
    import torch

    from composer.methods import MergeMethod

__all__ = ["Survival", "cast_block", "merge_block"]


class Survival:
    """How much of each delta is left after rounding, as ⟨R, Δᵢ⟩ / ⟨D, Δᵢ⟩ over all blocks.

    R is the change that was written, D the exact sum of deltas, Δᵢ one adapter's. 1 means all of it, 0 none: a
    delta far below the spacing of bf16 rounds away. Sums are float64.
    """

    def __init__(self, terms: int) -> None:
        self._written = [0.0] * terms
        self._exact = [0.0] * terms
        self._norm = [0.0] * terms
        self._total_norm = 0.0

    def add(self, written: torch.Tensor, exact: torch.Tensor, deltas: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Account for one block; all tensors float32 of one shape, each delta with its term's index."""
        flat_written, flat_exact = written.flatten(), exact.flatten()
        self._total_norm += float(flat_exact @ flat_exact)
        for term, delta in deltas:
            flat = delta.flatten()
            self._written[term] += float(flat_written @ flat)
            self._exact[term] += float(flat_exact @ flat)
            self._norm[term] += float(flat @ flat)

    def shares(self) -> list[float | None]:
        """One share a term, rounded to 4 digits; None where it is undefined (no delta, or deltas that cancel out)."""
        shares: list[float | None] = []
        for written, exact, norm in zip(self._written, self._exact, self._norm, strict=True):
            defined = abs(exact) > 1e-3 * (norm * self._total_norm) ** 0.5 > 0
            shares.append(round(written / exact, 4) if defined else None)
        return shares

    def norms(self) -> list[float]:
        """‖Δᵢ‖ (Frobenius, over all low-rank tensors) of each unweighted term."""
        return [norm**0.5 for norm in self._norm]


def merge_block(
    base: torch.Tensor,
    deltas: Sequence[tuple[int, float, torch.Tensor]],
    method: MergeMethod,
    dtype: str,
    survival: Survival,
) -> torch.Tensor:
    """base + method(deltas), rounded once to `dtype`.

    base: [rows, …] of any float dtype. deltas: (term, weight, float32 [rows, …]).
    """
    import torch

    original = base.to(torch.float32)
    kept = [(term, delta.clone()) for term, _, delta in deltas]
    total = method([delta for _, _, delta in deltas], [weight for _, weight, _ in deltas])
    result = (original + total).to(torch_dtype(dtype))
    survival.add(result.to(torch.float32) - original, total, kept)
    return result


def cast_block(block: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """Round a block to `dtype`. Raises NonFiniteError when finite numbers overflow (bf16 to fp16)."""

    result = block.to(torch_dtype(dtype))
    check_overflow(block, result, name)
    return result


def check_overflow(before: torch.Tensor, after: torch.Tensor, name: str) -> None:
    """Raise NonFiniteError where `before` is finite and `after` is not."""
    import torch

    if bool(torch.isfinite(after).all()) or not bool(torch.isfinite(before).all()):
        return
    raise NonFiniteError(
        f"{name}: the result does not fit into {after.dtype}",
        expected="finite numbers",
        found=f"{int((~torch.isfinite(after)).sum())} that are infinite or NaN",
        remedy="choose --dtype bf16 or fp32, or smaller weights",
        tensor=name,
    )

"""The weighted sum of deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from composer.methods import merge_method

if TYPE_CHECKING:
    import torch

__all__ = ["linear"]


@merge_method
def linear(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ wᵢ·Δᵢ, the true sum in product space.

    deltas: one or more float32 blocks [rows, …], already scaled; they may be overwritten. weights: one a delta.
    Returns float32 of the same shape. PEFT's `linear` sums A and B apart instead, which adds cross terms.
    """
    total = deltas[0] if weights[0] == 1.0 else deltas[0].mul_(weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total

"""The hot loop: one block of a tensor, float32 accumulation, one rounding.

    fused        bf16 base, bf16 output, low-rank deltas summed linearly: one pass, in place (composer.product)
    general      everything else, in float32 numpy

Both give the same bytes where both apply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from composer.deltas import BlockDelta, LoadedLowRank
from composer.errors import NonFiniteError
from composer.methods import BoundMethod
from composer.product import Factors, add_product
from composer.tensors import DTYPES

__all__ = ["LoadedTerm", "Survival", "cast_block", "fusible", "merge_block", "merge_fused", "restores"]


@dataclass(frozen=True, slots=True)
class LoadedTerm:
    """One loaded delta of a tensor, its weight and the index of its term in the recipe."""

    delta: BlockDelta
    weight: float
    term: int


@dataclass(slots=True)
class Survival:
    """How much of each delta is left after rounding, as ⟨R, Δᵢ⟩ / ⟨D, Δᵢ⟩.

    R is the change that was written, D the exact sum of deltas, Δᵢ one adapter's. 1 means all of it, 0 none: a
    delta far below the spacing of bf16 rounds away. Sums are float64. Large tensors are sampled: each block counts
    with a factor that makes up for the rows left out.
    """

    terms: int
    _written: np.ndarray = field(init=False)
    _exact: np.ndarray = field(init=False)
    _norm: np.ndarray = field(init=False)
    _total_norm: float = 0.0

    def __post_init__(self) -> None:
        self._written, self._exact, self._norm = np.zeros((3, self.terms))

    def add(
        self, written: np.ndarray, exact: np.ndarray, deltas: Sequence[tuple[int, np.ndarray]], factor: float = 1.0
    ) -> None:
        """Account for one block; all arrays float32 of one shape, each delta with its term's index."""
        flat_written, flat_exact = written.ravel(), exact.ravel()
        self._total_norm += factor * float(flat_exact @ flat_exact)
        for term, delta in deltas:
            flat = delta.ravel()
            self._written[term] += factor * float(flat_written @ flat)
            self._exact[term] += factor * float(flat_exact @ flat)
            self._norm[term] += factor * float(flat @ flat)

    def add_products(
        self,
        written: tuple[np.ndarray, np.ndarray],
        exact: tuple[np.ndarray, np.ndarray],
        deltas: Mapping[int, tuple[np.ndarray, np.ndarray]],
    ) -> None:
        """Account for one tensor whose changes are products left·right, by their factors: no product is formed.

        written: what R is the product of; exact: D; deltas: one pair a term. ⟨L₁R₁, L₂R₂⟩ = Σ (L₁ᵀL₂) ⊙ (R₁R₂ᵀ).
        """
        self._total_norm += _inner(exact, exact)
        for term, delta in deltas.items():
            self._written[term] += _inner(written, delta)
            self._exact[term] += _inner(exact, delta)
            self._norm[term] += _inner(delta, delta)

    def merge(self, other: Survival) -> None:
        """Add the sums of `other`, measured apart."""
        self._written += other._written
        self._exact += other._exact
        self._norm += other._norm
        self._total_norm += other._total_norm

    def shares(self) -> list[float | None]:
        """One share a term, rounded to 4 digits; None where it is undefined (no delta, or deltas that cancel out)."""
        shares: list[float | None] = []
        for written, exact, norm in zip(self._written, self._exact, self._norm, strict=True):
            defined = abs(exact) > 1e-3 * (norm * self._total_norm) ** 0.5 > 0
            shares.append(round(float(written / exact), 4) if defined else None)
        return shares

    def norms(self) -> list[float]:
        """‖Δᵢ‖ (Frobenius, over all tensors that are added to) of each unweighted term."""
        return [float(norm) ** 0.5 for norm in self._norm]


def _inner(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    (left, right), (left2, right2) = (tuple(side.astype(np.float64) for side in pair) for pair in (one, other))
    return float(np.sum((left.T @ left2) * (right @ right2.T)))


def fusible(terms: Sequence[LoadedTerm], method: str, source: str, target: str) -> bool:
    """Whether the one-pass kernel computes this tensor."""
    return (
        method == "linear"
        and source == target == "BF16"
        and all(isinstance(term.delta, LoadedLowRank) and term.delta.copy is None for term in terms)
    )


def restores(terms: Sequence[LoadedTerm], method: str) -> bool:
    """Whether the result is one adapter's own numbers, which base + (W' − W) in float32 would not always give."""
    alone = len(terms) == 1 and terms[0].weight == 1.0 and method in ("linear", "cat")
    return alone and hasattr(terms[0].delta, "restored")


def merge_fused(block: np.ndarray, terms: Sequence[LoadedTerm], start: int) -> bool:
    """block += Σ wᵢ·Δᵢ in place, for rows [start, start + len(block)) of a tensor, bf16.

    block: bf16 bits as uint16 [rows, columns]. Returns whether all is finite; where not, the block is lost and
    `merge_block` computes it from the base.
    """
    stop = start + len(block)
    factors = []
    for term in terms:
        delta = term.delta
        assert isinstance(delta, LoadedLowRank)
        factors.append(Factors(delta.left[start:stop], delta.right, delta.scale, np.float32(term.weight)))
    return add_product(block, factors)


def merge_block(
    base: np.ndarray, terms: Sequence[LoadedTerm], start: int, method: BoundMethod, dtype: str
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.ndarray]]]:
    """base + method(deltas) for rows [start, start + len(base)), rounded once to `dtype`.

    base: [rows, columns] of any float dtype. Returns the result, the float32 change before rounding, and each
    term's own unweighted delta.
    """
    original = base.astype(np.float32)
    deltas = [(term.term, term.delta.rows(start, start + len(base), original)) for term in terms]
    blocks, weights = [delta for _, delta in deltas], [term.weight for term in terms]
    total = method(blocks, weights, original, start, [term.delta for term in terms])
    with np.errstate(over="ignore"):  # an overflow is looked for by the caller, and named
        result = (original + total).astype(DTYPES[dtype])
    return result, total, deltas


def cast_block(block: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Round a block to `dtype`. Raises NonFiniteError when finite numbers overflow (bf16 to fp16)."""
    with np.errstate(over="ignore"):
        result = block.astype(DTYPES[dtype])
    check_overflow(block, result, name)
    return result


def check_overflow(before: np.ndarray, after: np.ndarray, name: str) -> None:
    """Raise NonFiniteError where `before` is finite and `after` is not."""
    if bool(np.isfinite(after).all()) or not bool(np.isfinite(before).all()):
        return
    raise NonFiniteError(
        f"{name}: the result does not fit into {after.dtype}",
        expected="finite numbers",
        found=f"{int((~np.isfinite(after)).sum())} that are infinite or NaN",
        remedy="choose --dtype bf16 or fp32, or smaller weights",
        tensor=name,
    )

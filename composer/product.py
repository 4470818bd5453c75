"""Low-rank products and sums, one defined order of operations on every machine.

    product      left·right                                   float32
    add_product  base + Σ wᵢ·(sᵢ·leftᵢ·rightᵢ), rounded once  bf16, in place, in one pass

Each element of a product is one chain of fused multiply-adds in float32, in the order of the rank: what the BLAS
libraries compute for ranks to 192, at any block size and thread count, so the bytes depend on neither. LLVM compiles it
to vector code; without llvmlite the same chain runs in numpy, in float64 with the one rounding that a fused
multiply-add has, and gives the same bytes at about a hundredth of the speed. REGISTRY_KERNEL=numpy chooses that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np

__all__ = ["Factors", "add_product", "kernel_name", "product"]


@dataclass(frozen=True, slots=True)
class Factors:
    """weight · (scale · left·right) with left [rows, r] and right [r, columns], float32, C-contiguous."""

    left: np.ndarray
    right: np.ndarray
    scale: np.float32
    weight: np.float32


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left [rows, r] times right [r, columns], both float32; returns float32 [rows, columns]."""
    out = np.empty((left.shape[0], right.shape[1]), np.float32)
    left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)
    if kernel_name() == "llvm":
        from composer.compiled import product_into

        product_into(out, left, right)
    else:
        _product_numpy(out, left, right)
    return out


def add_product(block: np.ndarray, terms: Sequence[Factors]) -> bool:
    """block += Σ wᵢ·(sᵢ·leftᵢ·rightᵢ), in place: the sum of terms is taken first, in order, then one rounding.

    block: bf16 bits as uint16 [rows, columns], C-contiguous. Returns whether every number is finite; where one is not,
    the block is lost.
    """
    if kernel_name() == "numpy":
        block[:] = _sum_numpy(block, terms)
        return bool(np.isfinite(block.view(ml_dtypes.bfloat16)).all())
    from composer.compiled import add_product_into

    left, right = terms[0].left, terms[0].right
    if len(terms) > 1:
        left = np.concatenate([term.left for term in terms], axis=1)
        right = np.concatenate([term.right for term in terms])
    ends = np.cumsum([term.right.shape[0] for term in terms])
    scales = np.array([term.scale for term in terms], np.float32)
    weights = np.array([term.weight for term in terms], np.float32)
    return add_product_into(block, left, right, ends, scales, weights)


def _sum_numpy(base: np.ndarray, terms: Sequence[Factors]) -> np.ndarray:
    deltas = (product(term.left, term.right) * term.scale * term.weight for term in terms)
    total = next(deltas)
    for delta in deltas:
        total += delta
    with np.errstate(over="ignore", invalid="ignore"):
        return (base.view(ml_dtypes.bfloat16).astype(np.float32) + total).astype(ml_dtypes.bfloat16).view(np.uint16)


def kernel_name() -> str:
    """`llvm`, or `numpy` where llvmlite is not installed or REGISTRY_KERNEL=numpy says so."""
    return "numpy" if os.environ.get("REGISTRY_KERNEL") == "numpy" or not _has_llvm() else "llvm"


@cache
def _has_llvm() -> bool:
    from importlib.util import find_spec

    return find_spec("llvmlite") is not None


def _product_numpy(out: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """The chain of fused multiply-adds in float64: product and sum are exact but for one rounding to odd."""
    out.fill(0)
    wide = right.astype(np.float64)
    for row in range(0, len(out), 64):
        part = out[row : row + 64]
        for rank in range(right.shape[0]):
            exact = left[row : row + 64, rank, None].astype(np.float64) * wide[rank]
            total = exact + part
            rest = total - exact
            error = (exact - (total - rest)) + (part - rest)
            # Rounding to odd in float64 makes the rounding to float32 that follows the only one (Boldo, Melquiond
            # 2008): where the sum is inexact and its last bit even, take the neighbour on the side of the error.
            bits = total.view(np.int64)
            inexact = (error != 0) & (bits & 1 == 0)
            bits += np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)
            part[...] = total

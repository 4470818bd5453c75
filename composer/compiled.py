"""The compiled forms of composer.product; importing this compiles nothing, the first call does and keeps it on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["add_product_into", "product_into"]

COLUMNS = 512  # a strip of columns stays in the first-level cache


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c with one rounding (IEEE 754 fusedMultiplyAdd), float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), generate


@njit(nogil=True, cache=True, error_model="numpy")
def _strip(total, left, right, row, start, stop, column, width):  # type: ignore[no-untyped-def]
    """total[:width] = left[row, start:stop] · right[start:stop, column:column + width], in the order of the rank."""
    for c in range(width):
        total[c] = np.float32(0)
    k = start
    while k + 8 <= stop:
        b0, b1, b2, b3 = left[row, k], left[row, k + 1], left[row, k + 2], left[row, k + 3]
        b4, b5, b6, b7 = left[row, k + 4], left[row, k + 5], left[row, k + 6], left[row, k + 7]
        a0, a1 = right[k, column : column + width], right[k + 1, column : column + width]
        a2, a3 = right[k + 2, column : column + width], right[k + 3, column : column + width]
        a4, a5 = right[k + 4, column : column + width], right[k + 5, column : column + width]
        a6, a7 = right[k + 6, column : column + width], right[k + 7, column : column + width]
        for c in range(width):
            low = fma(b3, a3[c], fma(b2, a2[c], fma(b1, a1[c], fma(b0, a0[c], total[c]))))
            total[c] = fma(b7, a7[c], fma(b6, a6[c], fma(b5, a5[c], fma(b4, a4[c], low))))
        k += 8
    while k < stop:
        b, a = left[row, k], right[k, column : column + width]
        for c in range(width):
            total[c] = fma(b, a[c], total[c])
        k += 1


@njit(nogil=True, cache=True, error_model="numpy")
def product_into(out, left, right):  # type: ignore[no-untyped-def]
    """out = left·right, float32."""
    rows, columns = out.shape
    for column in range(0, columns, COLUMNS):
        width = min(COLUMNS, columns - column)
        for row in range(rows):
            _strip(out[row, column : column + width], left, right, row, 0, right.shape[0], column, width)


@njit(nogil=True, cache=True, error_model="numpy")
def add_product_into(base, out, left, right, ends, scales, weights):  # type: ignore[no-untyped-def]
    """out = base + Σ weight·(scale·left·right), bf16 bits in and out; term i has the ranks up to ends[i]."""
    rows, columns = base.shape
    one, total = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    wide = np.empty(COLUMNS, np.float32)
    bits, sums = wide.view(np.uint32), total.view(np.uint32)
    half, sign, nan = np.uint32(0x7FFF), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
    sixteen, bit, quiet = np.uint32(16), np.uint32(1), np.uint32(0x40)
    for column in range(0, columns, COLUMNS):
        width = min(COLUMNS, columns - column)
        for row in range(rows):
            start = 0
            for term in range(len(ends)):
                _strip(one, left, right, row, start, ends[term], column, width)
                start = ends[term]
                scale, weight = scales[term], weights[term]
                if term == 0:
                    for c in range(width):
                        total[c] = (one[c] * scale) * weight
                else:
                    for c in range(width):
                        total[c] = total[c] + (one[c] * scale) * weight
            source, target = base[row, column : column + width], out[row, column : column + width]
            for c in range(width):
                bits[c] = np.uint32(source[c]) << sixteen
            for c in range(width):
                total[c] = wide[c] + total[c]
            for c in range(width):
                x = sums[c]
                rounded = (x + half + ((x >> sixteen) & bit)) >> sixteen
                if (x & sign) > nan:
                    rounded = (x >> sixteen) | quiet
                target[c] = np.uint16(rounded)

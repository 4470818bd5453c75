"""The compiled forms of composer.product; importing this compiles nothing, the first call does and keeps it on disk.

right is packed in panels of 16 columns:  [panel][rank][16]
4 rows × 16 columns are held in registers while the rank runs; then scale, weight, base and rounding
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["add_product_into", "product_into"]

LANES, ROWS, WIDTH = 8, 4, 16
COLUMNS = 512  # a strip of columns of this width is packed at once: it stays in the second-level cache


def _fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    name = "llvm.fma.v8f32" if isinstance(a.type, ir.VectorType) else "llvm.fma.f32"
    found = builder.module.globals.get(name)
    return builder.call(found or ir.Function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name), [a, b, c])


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c with one rounding (IEEE 754 fusedMultiplyAdd), float32."""
    scalar = types.float32
    return scalar(scalar, scalar, scalar), lambda context, builder, signature, args: _fused(builder, *args)


@intrinsic
def tile(
    typing: Any, out: Any, column: Any, left: Any, row: Any, packed: Any, panel: Any, start: Any, stop: Any
) -> Any:
    """out[:4, column:column + 16] = left[row:row + 4, start:stop] · the panel of `packed` that begins at `panel`.

    out, left: float32, two dimensions, C-contiguous. packed: float32, one dimension.
    """
    signature = types.void(out, types.intp, left, types.intp, packed, types.intp, types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size, vector = context.get_value_type(types.intp), ir.VectorType(ir.FloatType(), LANES)
        lane = ir.VectorType(ir.IntType(32), LANES)

        def number(value: int) -> Any:
            return ir.Constant(size, value)

        def array(index: int) -> Any:
            return context.make_array(signature.args[index])(context, builder, args[index])

        def row_length(found: Any) -> Any:
            return builder.udiv(cgutils.unpack_tuple(builder, found.strides, 2)[0], number(4))

        def vector_at(data: Any, index: Any) -> Any:
            return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

        target, factors, panels = array(0), array(2), array(4)
        _, column, _, row, _, panel, start, stop = args
        zero, undefined = ir.Constant(vector, [0.0] * LANES), ir.Constant(vector, ir.Undefined)
        sums = [[cgutils.alloca_once(builder, vector) for _ in range(WIDTH // LANES)] for _ in range(ROWS)]
        for pointer in (pointer for line in sums for pointer in line):
            builder.store(zero, pointer)
        length = row_length(factors)
        begins = [builder.mul(builder.add(row, number(index)), length) for index in range(ROWS)]
        with cgutils.for_range(builder, stop, start=start) as loop:
            first = builder.add(builder.mul(loop.index, number(WIDTH)), panel)
            columns = [
                builder.load(vector_at(panels.data, builder.add(first, number(part * LANES))), align=4)
                for part in range(WIDTH // LANES)
            ]
            for begin, line in zip(begins, sums, strict=True):
                scalar = builder.load(builder.gep(factors.data, [builder.add(begin, loop.index)]))
                single = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
                spread = builder.shuffle_vector(single, undefined, ir.Constant(lane, [0] * LANES))
                for values, pointer in zip(columns, line, strict=True):
                    builder.store(_fused(builder, spread, values, builder.load(pointer)), pointer)
        length = row_length(target)
        for index, line in enumerate(sums):
            for part, pointer in enumerate(line):
                place = builder.add(builder.add(builder.mul(number(index), length), column), number(part * LANES))
                builder.store(builder.load(pointer), vector_at(target.data, place), align=4)
        return context.get_dummy_value()

    return signature, generate


@njit(nogil=True, cache=True, error_model="numpy")
def _pack(packed, right, column, width):  # type: ignore[no-untyped-def]
    """The whole panels of right[:, column:column + width]."""
    ranks = right.shape[0]
    for k in range(ranks):
        source = right[k, column : column + width]
        for panel in range(width // WIDTH):
            for c in range(WIDTH):
                packed[(panel * ranks + k) * WIDTH + c] = source[panel * WIDTH + c]


@njit(nogil=True, cache=True, error_model="numpy")
def _strip(out, place, left, right, packed, row, rows, start, stop, column, width):  # type: ignore[no-untyped-def]
    """out[:rows, place:place + width] = left[row:row + rows, start:stop] · right[start:stop, column:column + width]."""
    done = 0
    if rows == ROWS:
        while done + WIDTH <= width:
            tile(out, place + done, left, row, packed, done * right.shape[0], start, stop)
            done += WIDTH
    for q in range(rows):
        for c in range(done, width):
            total = np.float32(0)
            for k in range(start, stop):
                total = fma(left[row + q, k], right[k, column + c], total)
            out[q, place + c] = total


@njit(nogil=True, cache=True, error_model="numpy")
def product_into(out, left, right):  # type: ignore[no-untyped-def]
    """out = left·right, float32."""
    rows, columns = out.shape
    packed = np.empty(COLUMNS * right.shape[0], np.float32)
    for column in range(0, columns, COLUMNS):
        width = min(COLUMNS, columns - column)
        _pack(packed, right, column, width)
        for row in range(0, rows, ROWS):
            count = min(ROWS, rows - row)
            _strip(out[row:], column, left, right, packed, row, count, 0, right.shape[0], column, width)


@njit(nogil=True, cache=True, error_model="numpy")
def add_product_into(base, out, left, right, ends, scales, weights):  # type: ignore[no-untyped-def]
    """out = base + Σ weight·(scale·left·right), bf16 bits in and out; term i has the ranks up to ends[i].

    Returns whether a sum or a result is infinite or not a number: then `out` is not to be used.
    """
    rows, columns = base.shape
    one, total = np.empty((ROWS, COLUMNS), np.float32), np.empty((ROWS, COLUMNS), np.float32)
    wide = np.empty(COLUMNS, np.float32)
    bits = wide.view(np.uint32)
    packed = np.empty(COLUMNS * right.shape[0], np.float32)
    sixteen, half, bit = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)
    exponent, lowest, special = np.uint32(0x7F800000), np.uint32(0x00800000), np.uint32(0)
    for column in range(0, columns, COLUMNS):
        width = min(COLUMNS, columns - column)
        _pack(packed, right, column, width)
        for row in range(0, rows, ROWS):
            count = min(ROWS, rows - row)
            start = 0
            for term in range(len(ends)):
                _strip(one, 0, left, right, packed, row, count, start, ends[term], column, width)
                start = ends[term]
                scale, weight = scales[term], weights[term]
                for q in range(count):
                    delta, line = one[q], total[q]
                    if term == 0:
                        for c in range(width):
                            line[c] = (delta[c] * scale) * weight
                    else:
                        for c in range(width):
                            line[c] = line[c] + (delta[c] * scale) * weight
            for q in range(count):
                source, target = base[row + q, column : column + width], out[row + q, column : column + width]
                line = total[q]
                for c in range(width):
                    bits[c] = np.uint32(source[c]) << sixteen
                for c in range(width):
                    wide[c] = wide[c] + line[c]
                for c in range(width):
                    x = bits[c]
                    rounded = x + half + ((x >> sixteen) & bit)
                    special |= ((x & exponent) + lowest) | ((rounded & exponent) + lowest)
                    target[c] = np.uint16(rounded >> sixteen)
    return special >> np.uint32(31) != np.uint32(0)

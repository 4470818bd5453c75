"""The compiled forms of composer.product; importing this compiles nothing, the first call does and keeps it on disk.

right is packed in panels of 16 columns:  [panel][rank][16]
4 rows × 16 columns are held in registers while the rank runs, and through scale, weight, base and rounding
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["add_product_into", "product_into"]

LANES, ROWS, WIDTH = 8, 4, 16
FLOATS, INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
HALVES = ir.VectorType(ir.IntType(16), LANES)
EXPONENT, LOWEST = 0x7F800000, 0x00800000  # of a float32: all ones plus the lowest overflows into the highest bit
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


class _Registers:
    """Writes the code of one tile: ROWS × WIDTH sums in vector registers.

    left: float32 [rows, ranks] and packed: float32, one dimension, as numba passes them.
    """

    def __init__(self, context: Any, builder: Any, left: Any, packed: Any) -> None:
        self.builder, self.size = builder, context.get_value_type(types.intp)
        self.left, self.packed, self.ranks = left, packed, self.row_length(left, 4)

    def number(self, value: int) -> Any:
        return ir.Constant(self.size, value)

    def row_length(self, array: Any, itemsize: int) -> Any:
        """Items between two rows of a C-contiguous array of two dimensions."""
        return self.builder.udiv(cgutils.unpack_tuple(self.builder, array.strides, 2)[0], self.number(itemsize))

    def vector_at(self, data: Any, index: Any, kind: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(data, [index]), kind.as_pointer())

    def sums(self, start: float) -> list[Any]:
        """Variables for the vectors of a tile, row by row; LLVM keeps them in registers."""
        found = [cgutils.alloca_once(self.builder, FLOATS) for _ in range(ROWS * WIDTH // LANES)]
        self.fill(found, start)
        return found

    def fill(self, sums: list[Any], value: float) -> None:
        for pointer in sums:
            self.builder.store(ir.Constant(FLOATS, [value] * LANES), pointer)

    def spread(self, scalar: Any) -> Any:
        """A vector of LANES times `scalar`."""
        undefined = ir.Constant(FLOATS, ir.Undefined)
        single = self.builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(single, undefined, ir.Constant(INTS, [0] * LANES))

    def accumulate(self, sums: list[Any], row: Any, panel: Any, start: Any, stop: Any) -> None:
        """sums += left[row:row + ROWS, start:stop] · the panel of `packed` that begins at `panel`."""
        builder, number = self.builder, self.number
        begins = [builder.mul(builder.add(row, number(index)), self.ranks) for index in range(ROWS)]
        with cgutils.for_range(builder, stop, start=start) as loop:
            first = builder.add(builder.mul(loop.index, number(WIDTH)), panel)
            columns = [
                builder.load(self.vector_at(self.packed.data, builder.add(first, number(part)), FLOATS), align=4)
                for part in range(0, WIDTH, LANES)
            ]
            scalars = [
                self.spread(builder.load(builder.gep(self.left.data, [builder.add(begin, loop.index)])))
                for begin in begins
            ]
            for (scalar, values), pointer in zip(product(scalars, columns), sums, strict=True):
                builder.store(_fused(builder, scalar, values, builder.load(pointer)), pointer)

    def places(self, array: Any, row: Any, column: Any, kind: Any, itemsize: int) -> list[Any]:
        """Where each vector of sums belongs in `array`, whose tile begins at [row, column]."""
        builder, number, length = self.builder, self.number, self.row_length(array, itemsize)
        begins = [builder.add(builder.mul(builder.add(row, number(index)), length), column) for index in range(ROWS)]
        parts = [number(part) for part in range(0, WIDTH, LANES)]
        return [self.vector_at(array.data, builder.add(*pair), kind) for pair in product(begins, parts)]


@intrinsic
def tile(typing: Any, out: Any, row: Any, column: Any, left: Any, packed: Any, panel: Any) -> Any:
    """out[row:row + 4, column:column + 16] = left[row:row + 4] · the panel of `packed` that begins at `panel`.

    out, left: float32, two dimensions, C-contiguous. packed: float32, one dimension.
    """
    signature = types.void(out, types.intp, types.intp, left, packed, types.intp)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, factors, panels = (
            context.make_array(signature.args[index])(context, builder, args[index]) for index in (0, 3, 4)
        )
        _, row, column, _, _, panel = args
        registers = _Registers(context, builder, factors, panels)
        sums = registers.sums(0.0)
        registers.accumulate(sums, row, panel, registers.number(0), registers.ranks)
        places = registers.places(target, row, column, FLOATS, 4)
        for place, pointer in zip(places, sums, strict=True):
            builder.store(builder.load(pointer), place, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def merge_tile(
    typing: Any, out: Any, base: Any, row: Any, column: Any, left: Any, packed: Any, panel: Any, ends: Any,
    scales: Any, weights: Any,
) -> Any:  # fmt: skip
    """out = base + Σ weight·(scale·left·panel) on [row:row + 4, column:column + 16], bf16 bits, all in registers.

    out, base: uint16, left: float32, two dimensions, C-contiguous; packed, scales, weights: float32, ends: intp, one
    dimension. Returns a uint32 whose highest bit is set when a sum or a result is infinite or not a number.
    """
    arrays = {0: out, 1: base, 4: left, 5: packed, 7: ends, 8: scales, 9: weights}
    signature = types.uint32(*(arrays.get(index, types.intp) for index in range(10)))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = {index: context.make_array(signature.args[index])(context, builder, args[index]) for index in arrays}
        registers = _Registers(context, builder, found[4], found[5])
        sums, totals = registers.sums(0.0), registers.sums(-0.0)  # -0 + x is x, whatever the sign of x
        count, start = cgutils.unpack_tuple(builder, found[7].shape, 1)[0], cgutils.alloca_once(builder, registers.size)
        builder.store(registers.number(0), start)
        with cgutils.for_range(builder, count) as loop:
            stop = builder.load(builder.gep(found[7].data, [loop.index]))
            registers.fill(sums, 0.0)
            registers.accumulate(sums, args[2], args[6], builder.load(start), stop)
            builder.store(stop, start)
            scale, weight = (registers.spread(builder.load(builder.gep(found[i].data, [loop.index]))) for i in (8, 9))
            for one, total in zip(sums, totals, strict=True):
                delta = builder.fmul(builder.fmul(builder.load(one), scale), weight)
                builder.store(builder.fadd(builder.load(total), delta), total)
        special = ir.Constant(INTS, [0] * LANES)
        sources = registers.places(found[1], args[2], args[3], HALVES, 2)
        targets = registers.places(found[0], args[2], args[3], HALVES, 2)
        for source, target, total in zip(sources, targets, totals, strict=True):
            rounded, flags = _round(builder, builder.load(source, align=2), builder.load(total))
            builder.store(rounded, target, align=2)
            special = builder.or_(special, flags)
        reduce = "llvm.vector.reduce.or.v8i32"
        function = builder.module.globals.get(reduce)
        function = function or ir.Function(builder.module, ir.FunctionType(ir.IntType(32), [INTS]), reduce)
        return builder.call(function, [special])

    return signature, generate


def _round(builder: Any, bits: Any, change: Any) -> tuple[Any, Any]:
    """(bf16 bits + float32 change) rounded to nearest even, and the flags of what is not finite."""

    def every(value: int) -> Any:
        return ir.Constant(INTS, [value] * LANES)

    wide = builder.bitcast(builder.shl(builder.zext(bits, INTS), every(16)), FLOATS)
    exact = builder.bitcast(builder.fadd(wide, change), INTS)
    odd = builder.and_(builder.lshr(exact, every(16)), every(1))
    rounded = builder.add(builder.add(exact, every(0x7FFF)), odd)
    flags = [builder.add(builder.and_(each, every(EXPONENT)), every(LOWEST)) for each in (exact, rounded)]
    return builder.trunc(builder.lshr(rounded, every(16)), HALVES), builder.or_(*flags)


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
def _chain(left, right, row, column, start, stop):  # type: ignore[no-untyped-def]
    """left[row, start:stop] · right[start:stop, column], one fused multiply-add after the other."""
    total = np.float32(0)
    for k in range(start, stop):
        total = fma(left[row, k], right[k, column], total)
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def product_into(out, left, right):  # type: ignore[no-untyped-def]
    """out = left·right, float32."""
    rows, columns = out.shape
    packed = np.empty(COLUMNS * right.shape[0], np.float32)
    for column in range(0, columns, COLUMNS):
        width = min(COLUMNS, columns - column)
        _pack(packed, right, column, width)
        for row in range(0, rows, ROWS):
            done, count = 0, min(ROWS, rows - row)
            if count == ROWS:
                while done + WIDTH <= width:
                    tile(out, row, column + done, left, packed, done * right.shape[0])
                    done += WIDTH
            for q in range(row, row + count):
                for c in range(column + done, column + width):
                    out[q, c] = _chain(left, right, q, c, 0, right.shape[0])


@njit(nogil=True, cache=True, error_model="numpy")
def add_product_into(base, out, left, right, ends, scales, weights):  # type: ignore[no-untyped-def]
    """out = base + Σ weight·(scale·left·right), bf16 bits in and out; term i has the ranks up to ends[i].

    Returns whether a sum or a result is infinite or not a number: then `out` is not to be used.
    """
    rows, columns = base.shape
    wide = np.empty(1, np.float32)
    bits = wide.view(np.uint32)
    packed = np.empty(COLUMNS * right.shape[0], np.float32)
    sixteen, half, bit = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)
    exponent, lowest, special = np.uint32(EXPONENT), np.uint32(LOWEST), np.uint32(0)
    for column in range(0, columns, COLUMNS):
        width = min(COLUMNS, columns - column)
        _pack(packed, right, column, width)
        for row in range(0, rows, ROWS):
            done, count = 0, min(ROWS, rows - row)
            if count == ROWS:
                while done + WIDTH <= width:
                    panel = done * right.shape[0]
                    special |= merge_tile(out, base, row, column + done, left, packed, panel, ends, scales, weights)
                    done += WIDTH
            for q in range(row, row + count):
                for c in range(column + done, column + width):
                    total, start = np.float32(-0.0), 0
                    for term in range(len(ends)):
                        delta = (_chain(left, right, q, c, start, ends[term]) * scales[term]) * weights[term]
                        total, start = total + delta, ends[term]
                    bits[0] = np.uint32(base[q, c]) << sixteen
                    wide[0] = wide[0] + total
                    x = bits[0]
                    rounded = x + half + ((x >> sixteen) & bit)
                    special |= ((x & exponent) + lowest) | ((rounded & exponent) + lowest)
                    out[q, c] = np.uint16(rounded >> sixteen)
    return special >> np.uint32(31) != np.uint32(0)

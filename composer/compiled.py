"""The compiled forms of composer.product: LLVM code for the processor at hand, made in milliseconds a process.

    right is packed in panels of `width` columns, two vectors:  [panel][rank][width]
    ROWS × width sums are held in registers while the rank runs, and through scale, weight, base and rounding

The code knows whole tiles only; a rest of rows or columns goes through a padded copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

__all__ = ["add_product_into", "product_into"]

ROWS, VECTORS = 4, 2  # of a tile: rows, and vectors in each
STRIP = 16  # panels: their part of `right` stays in the second-level cache while all rows run
EXPONENT, LOWEST = 0x7F800000, 0x00800000  # of a float32: all ones plus the lowest overflows into the highest bit
SIZE, WORD, HALF, FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()


def product_into(out: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """out = left·right, float32, C-contiguous."""
    code = _compiled()
    for part, rows, packed in _tiles(out, left, right, code.width):
        code.product(
            part.ctypes.data, part.strides[0] // 4, rows.ctypes.data, packed.ctypes.data, *_sizes(rows, packed)
        )


def add_product_into(
    block: np.ndarray, left: np.ndarray, right: np.ndarray, ends: np.ndarray, scales: np.ndarray, weights: np.ndarray
) -> bool:
    """block += Σ weight·(scale·left·right), bf16 bits in place; term i has the ranks up to ends[i].

    block: uint16; left, right, scales, weights: float32; ends: int64; all C-contiguous. Returns whether every sum and
    result is finite; where not, the block is lost.
    """
    code, special = _compiled(), 0
    terms = (ends.ctypes.data, scales.ctypes.data, weights.ctypes.data, len(ends))
    for part, rows, packed in _tiles(block, left, right, code.width):
        special |= code.merge(
            part.ctypes.data, part.strides[0] // 2, rows.ctypes.data, packed.ctypes.data, *_sizes(rows, packed), *terms
        )
    return not special >> 31


def _sizes(left: np.ndarray, packed: np.ndarray) -> tuple[int, int, int]:
    return len(left), len(packed), left.shape[1]


def _tiles(
    block: np.ndarray, left: np.ndarray, right: np.ndarray, width: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The block in parts of whole tiles, each with its rows of left and its panels of right.

    What is left of the rows and columns is given as a copy, padded with zeros, and taken back afterwards.
    """
    (rows, columns), ranks = block.shape, right.shape[0]
    whole_rows, whole_columns = rows - rows % ROWS, columns - columns % width
    panels = -(-columns // width)
    padded = right if columns == panels * width else np.pad(right, ((0, 0), (0, panels * width - columns)))
    packed = np.ascontiguousarray(padded.reshape(ranks, panels, width).transpose(1, 0, 2))
    full = whole_columns // width
    if whole_rows and full:
        yield block[:whole_rows, :whole_columns], left[:whole_rows], packed[:full]
    rests = [(0, rows, whole_columns, columns, packed[full:]), (whole_rows, rows, 0, whole_columns, packed[:full])]
    for top, bottom, first, last, part in rests:
        if top == bottom or first == last:
            continue
        height = -(-(bottom - top) // ROWS) * ROWS
        copy = np.zeros((height, len(part) * width), block.dtype)
        copy[: bottom - top, : last - first] = block[top:bottom, first:last]
        yield copy, np.pad(left[top:bottom], ((0, height - (bottom - top)), (0, 0))), part
        block[top:bottom, first:last] = copy[: bottom - top, : last - first]


@dataclass(frozen=True, slots=True)
class _Code:
    """Machine code for tiles of `width` columns, called without Python's lock; `engine` owns it."""

    width: int
    product: Callable[..., None]
    merge: Callable[..., int]
    engine: Any


@cache
def _compiled() -> _Code:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    lanes = 16 if features.get("avx512f") else 8
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=2
    )
    written = ir.Module("product")
    written.triple = target.triple
    _write_product(written, lanes)
    _write_merge(written, lanes)
    module = llvm.parse_assembly(str(written))
    passes = llvm.create_new_module_pass_manager()  # a whole pipeline takes ten times as long and gains nothing
    passes.add_sroa_pass()
    passes.add_simplify_cfg_pass()
    passes.add_instruction_combine_pass()
    passes.run(module, llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options()))
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    pointer, size, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32
    common = (pointer, size, pointer, pointer, size, size, size)
    product = ctypes.CFUNCTYPE(None, *common)(engine.get_function_address("product"))
    merge = ctypes.CFUNCTYPE(word, *common, pointer, pointer, pointer, size)(engine.get_function_address("merge"))
    return _Code(VECTORS * lanes, product, merge, engine)


class _Tile:
    """Writes the code of ROWS × `width` sums, held as vectors of `lanes`, row by row."""

    def __init__(self, builder: ir.IRBuilder, lanes: int) -> None:
        self.builder, self.lanes, self.width = builder, lanes, VECTORS * lanes
        self.floats, self.words = ir.VectorType(FLOAT, lanes), ir.VectorType(WORD, lanes)
        self.halves = ir.VectorType(HALF, lanes)
        module = builder.module
        name = f"llvm.fma.v{lanes}f32"
        kind = ir.FunctionType(self.floats, [self.floats] * 3)
        self.fused = module.globals.get(name) or ir.Function(module, kind, name)

    def sums(self) -> list[Any]:
        """Variables, which LLVM keeps in registers."""
        return [self.builder.alloca(self.floats) for _ in range(ROWS * VECTORS)]

    def fill(self, sums: list[Any], value: float) -> None:
        for pointer in sums:
            self.builder.store(ir.Constant(self.floats, [value] * self.lanes), pointer)

    def every(self, value: int) -> Any:
        return ir.Constant(self.words, [value] * self.lanes)

    def spread(self, pointer: Any) -> Any:
        """A vector of the float at `pointer`."""
        undefined = ir.Constant(self.floats, ir.Undefined)
        single = self.builder.insert_element(undefined, self.builder.load(pointer), ir.Constant(WORD, 0))
        return self.builder.shuffle_vector(single, undefined, self.every(0))

    def accumulate(self, sums: list[Any], rows: list[Any], panel: Any, start: Any, stop: Any) -> None:
        """sums += left[rows, start:stop] · panel, a chain of fused multiply-adds in the order of the rank."""
        builder = self.builder
        with _loop(builder, start, stop, 1) as rank:
            line = builder.gep(panel, [builder.mul(rank, ir.Constant(SIZE, self.width))])
            vectors = [builder.load(place, align=4) for place in self.places(line, self.floats)]
            for index, row in enumerate(rows):
                scalar = self.spread(builder.gep(row, [rank]))
                for vector, pointer in zip(vectors, sums[index * len(vectors) :], strict=False):
                    builder.store(builder.call(self.fused, [scalar, vector, builder.load(pointer)]), pointer)

    def places(self, line: Any, kind: Any) -> list[Any]:
        """Pointers to the vectors that begin at `line`."""
        builder = self.builder
        starts = (builder.gep(line, [ir.Constant(SIZE, part)]) for part in range(0, self.width, self.lanes))
        return [builder.bitcast(start, kind.as_pointer()) for start in starts]

    def add_rounded(self, bits: Any, change: Any) -> tuple[Any, Any]:
        """(bf16 bits + float32 change) rounded to nearest even, and the flags of what is not finite."""
        builder, every = self.builder, self.every
        wide = builder.bitcast(builder.shl(builder.zext(bits, self.words), every(16)), self.floats)
        exact = builder.bitcast(builder.fadd(wide, change), self.words)
        odd = builder.and_(builder.lshr(exact, every(16)), every(1))
        rounded = builder.add(builder.add(exact, every(0x7FFF)), odd)
        flags = [builder.add(builder.and_(each, every(EXPONENT)), every(LOWEST)) for each in (exact, rounded)]
        return builder.trunc(builder.lshr(rounded, every(16)), self.halves), builder.or_(*flags)


@contextmanager
def _loop(builder: ir.IRBuilder, start: Any, stop: Any, step: int) -> Iterator[Any]:
    """The code within runs for start, start + step … while less than `stop`."""
    before = builder.block
    head, body = builder.append_basic_block(), builder.append_basic_block()
    after = builder.append_basic_block()
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(SIZE)
    index.add_incoming(start, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), body, after)
    builder.position_at_end(body)
    yield index
    index.add_incoming(builder.add(index, ir.Constant(SIZE, step)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)


@contextmanager
def _each_tile(builder: ir.IRBuilder, width: int, arguments: list[Any]) -> Iterator[tuple[list[Any], list[Any], Any]]:
    """The code within runs for each tile: the places of its rows in the block and in left, and its panel of right."""
    block, length, left, packed, rows, panels, ranks = arguments
    with _loop(builder, ir.Constant(SIZE, 0), panels, STRIP) as first:
        end = builder.add(first, ir.Constant(SIZE, STRIP))
        end = builder.select(builder.icmp_signed("<", end, panels), end, panels)
        with _loop(builder, ir.Constant(SIZE, 0), rows, ROWS) as top, _loop(builder, first, end, 1) as panel:
            column = builder.mul(panel, ir.Constant(SIZE, width))
            numbers = [builder.add(top, ir.Constant(SIZE, row)) for row in range(ROWS)]
            lines = [builder.gep(block, [builder.add(builder.mul(row, length), column)]) for row in numbers]
            yield (
                lines,
                [builder.gep(left, [builder.mul(row, ranks)]) for row in numbers],
                builder.gep(packed, [builder.mul(column, ranks)]),
            )


def _write_product(module: ir.Module, lanes: int) -> None:
    floats = FLOAT.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [floats, SIZE, floats, floats, SIZE, SIZE, SIZE])
    function = ir.Function(module, kind, "product")
    builder = ir.IRBuilder(function.append_basic_block())
    tile = _Tile(builder, lanes)
    sums = tile.sums()
    with _each_tile(builder, tile.width, list(function.args)) as (lines, rows, panel):
        tile.fill(sums, 0.0)
        tile.accumulate(sums, rows, panel, ir.Constant(SIZE, 0), function.args[6])
        places = [place for line in lines for place in tile.places(line, tile.floats)]
        for place, pointer in zip(places, sums, strict=True):
            builder.store(builder.load(pointer), place, align=4)
    builder.ret_void()


def _write_merge(module: ir.Module, lanes: int) -> None:
    floats, halves, sizes = FLOAT.as_pointer(), HALF.as_pointer(), SIZE.as_pointer()
    kind = ir.FunctionType(WORD, [halves, SIZE, floats, floats, SIZE, SIZE, SIZE, sizes, floats, floats, SIZE])
    function = ir.Function(module, kind, "merge")
    builder = ir.IRBuilder(function.append_basic_block())
    tile = _Tile(builder, lanes)
    sums, totals = tile.sums(), tile.sums()
    special, start = builder.alloca(tile.words), builder.alloca(SIZE)
    builder.store(tile.every(0), special)
    ends, scales, weights, terms = function.args[7:]
    with _each_tile(builder, tile.width, list(function.args[:7])) as (lines, rows, panel):
        tile.fill(totals, -0.0)  # -0 + x is x, whatever the sign of x
        builder.store(ir.Constant(SIZE, 0), start)
        with _loop(builder, ir.Constant(SIZE, 0), terms, 1) as term:
            stop = builder.load(builder.gep(ends, [term]))
            tile.fill(sums, 0.0)
            tile.accumulate(sums, rows, panel, builder.load(start), stop)
            builder.store(stop, start)
            scale, weight = (tile.spread(builder.gep(array, [term])) for array in (scales, weights))
            for one, total in zip(sums, totals, strict=True):
                delta = builder.fmul(builder.fmul(builder.load(one), scale), weight)
                builder.store(builder.fadd(builder.load(total), delta), total)
        places = [place for line in lines for place in tile.places(line, tile.halves)]
        for place, total in zip(places, totals, strict=True):
            rounded, flags = tile.add_rounded(builder.load(place, align=2), builder.load(total))
            builder.store(rounded, place, align=2)
            builder.store(builder.or_(builder.load(special), flags), special)
    name = f"llvm.vector.reduce.or.v{lanes}i32"
    reduce = ir.Function(module, ir.FunctionType(WORD, [tile.words]), name)
    builder.ret(builder.call(reduce, [builder.load(special)]))

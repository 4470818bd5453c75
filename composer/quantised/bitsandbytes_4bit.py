"""bitsandbytes 4-bit: NF4 and FP4, with and without double quantisation (arXiv:2305.14314 §3).

    W.weight                                 two numbers a byte, the first in the high half; n numbers in row order
    W.weight.quant_map                       the 16 values that a half byte stands for
    W.weight.absmax                          one scale a block of `blocksize` numbers: F32, or U8 where nested
    W.weight.nested_quant_map                nested: the 256 values that such a byte stands for
    W.weight.nested_absmax                   nested: one scale a block of `nested_blocksize` scales
    W.weight.quant_state.bitsandbytes__nf4   JSON bytes: blocksize, dtype, shape, nested_blocksize, nested_offset

    scale = nested_quant_map[byte] · nested_absmax + nested_offset        each operation rounded to float32
    value = quant_map[half] · scale, rounded to the state's dtype

The last rounding is a part of the format: dequantize_4bit returns that dtype, and the layer multiplies with what it
returns. Blocks run over rows, so that a row need not begin with one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from composer.quantised import FLOATS, Decoder, corrupt, scheme
from composer.quantised.packing import look_up, rounded
from composer.tensors import DTYPES, ArraySpec, TensorSpec

__all__ = ["BitsAndBytes4Bit"]

STATE = ".quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
TYPES = ("nf4", "fp4")
MAX_STATE_BYTES = 4096
MAX_BLOCK = 1 << 16  # bitsandbytes has 4096 at most
LARGEST = 3e38
TINY = np.float32(1e-38)  # bitsandbytes divides by no less


@dataclass(frozen=True, slots=True)
class State:
    """The JSON beside a quantised weight."""

    shape: tuple[int, ...]
    dtype: str
    blocksize: int
    nested_blocksize: int = 0
    nested_offset: float = 0.0

    @property
    def count(self) -> int:
        """How many numbers the weight has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class FourBit:
    """One weight; `packed`, `absmax`, `nested` lie in the file, the two maps and the state are its constants."""

    name: str
    state: State
    packed: TensorSpec
    absmax: TensorSpec
    quant_map: TensorSpec
    state_bytes: TensorSpec
    nested_absmax: TensorSpec | None = None
    nested_map: TensorSpec | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.state.shape

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        own = (self.packed, self.absmax, self.quant_map, self.state_bytes, self.nested_absmax, self.nested_map)
        return tuple(part for part in own if part is not None)

    def rows(self, start: int, stop: int) -> np.ndarray:
        columns, size = self.state.count // self.shape[0], self.state.blocksize
        first, last = start * columns, stop * columns
        block, end = first // size, -(-last // size)
        halves = np.zeros((end - block) * size // 2, np.uint8)
        raw = self.packed.read_bytes(block * size // 2, min(self.packed.nbytes, end * size // 2))
        halves[: len(raw)] = np.frombuffer(raw, np.uint8)
        blocks = look_up(self.quant_map.read(), halves, high_first=True).reshape(end - block, size)
        blocks *= self._scales(block, end)[:, None]
        values = blocks.reshape(-1)[first - block * size : last - block * size].reshape(stop - start, columns)
        return np.ascontiguousarray(rounded(values, self.state.dtype))

    def encoder(self) -> FourBitEncoder:
        return FourBitEncoder(self)

    def _scales(self, start: int, stop: int) -> np.ndarray:
        """float32 scales of the blocks [start, stop)."""
        scales = _range(self.absmax, start, stop)
        if self.nested_absmax is None or self.nested_map is None:
            return scales
        size = self.state.nested_blocksize
        outer = np.repeat(_range(self.nested_absmax, start // size, -(-stop // size)), size)
        outer = outer[start % size :][: stop - start]
        return self.nested_map.read()[scales] * outer + np.float32(self.state.nested_offset)


class FourBitEncoder:
    """The layer's own quantisation, applied to other numbers.

    Each block is divided by its largest magnitude, and a number becomes the nearest of the map (the first of two that
    are equally near, in the map's order of size): what quantize_4bit gives, bit for bit. Nested: the mean of the scales
    is taken off, in float64 and rounded once, and they are quantised in the same way by the nested map, as
    bitsandbytes' reference kernel does (its CPU kernel looks numbers up in a table and is one code off in 0.1%).
    """

    def __init__(self, layer: FourBit) -> None:
        self._layer = layer
        self._packed = np.zeros(-(-layer.state.count // 2), np.uint8)
        self._absmax = np.zeros(-(-layer.state.count // layer.state.blocksize), np.float32)
        self._map = layer.quant_map.read()

    @property
    def dtype(self) -> str:
        return self._layer.state.dtype

    @property
    def step(self) -> int:
        size = self._layer.state.blocksize
        return size // math.gcd(self._columns, size)

    @property
    def _columns(self) -> int:
        return self._layer.state.count // self._layer.shape[0]

    def encode(self, start: int, values: np.ndarray) -> None:
        first, size = start * self._columns, self._layer.state.blocksize
        codes, absmax = _nearest(rounded(values, self.dtype).reshape(-1), size, self._map)
        codes = np.append(codes, _nearest(np.zeros(1, np.float32), size, self._map)[0]) if codes.size % 2 else codes
        self._packed[first // 2 : first // 2 + codes.size // 2] = codes[::2] << 4 | codes[1::2]
        self._absmax[first // size : first // size + absmax.size] = absmax

    def finish(self) -> FourBit:
        layer, state = self._layer, self._layer.state
        packed = ArraySpec.like(layer.packed, self._packed)
        if layer.nested_absmax is None or layer.nested_map is None:
            return replace(layer, packed=packed, absmax=ArraySpec.like(layer.absmax, self._absmax))
        offset = np.float32(self._absmax.mean(dtype=np.float64))
        codes, outer = _nearest(self._absmax - offset, state.nested_blocksize, layer.nested_map.read())
        fields = json.loads(bytes(layer.state_bytes.read_bytes(0, layer.state_bytes.nbytes)))
        text = np.frombuffer(json.dumps({**fields, "nested_offset": float(offset)}).encode(), np.uint8)
        return replace(
            layer,
            state=replace(state, nested_offset=float(offset)),
            packed=packed,
            absmax=ArraySpec.like(layer.absmax, codes),
            nested_absmax=ArraySpec.like(layer.nested_absmax, outer),
            state_bytes=ArraySpec.like(layer.state_bytes, text, text.shape),
        )


def _nearest(values: np.ndarray, size: int, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 indices into `levels` [values.size] and the float32 scale of each block of `size` float32 values [n]."""
    blocks = np.pad(values, (0, -values.size % size)).reshape(-1, size)
    absmax = np.abs(blocks).max(axis=1)
    scale = np.maximum(absmax, TINY)
    order = np.argsort(levels, kind="stable")
    middles = (levels[order][:-1] + levels[order][1:]) / np.float32(2)
    shares = blocks * (np.float32(1) / scale)[:, None]
    if values.size % size:  # bitsandbytes divides a block that is not full, and keeps its scale above 0
        shares[-1], absmax[-1] = blocks[-1] / scale[-1], scale[-1]
    codes = np.searchsorted(middles, np.clip(shares, -1, 1).reshape(-1)[: values.size], side="left")
    return order[codes].astype(np.uint8), absmax


def _range(spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    dtype = DTYPES[spec.dtype]
    return np.frombuffer(spec.read_bytes(start * dtype.itemsize, stop * dtype.itemsize), dtype)


@scheme
class BitsAndBytes4Bit:
    """QLoRA's bases, as save_pretrained writes them."""

    name = "bitsandbytes 4-bit"

    def matches(self, config: Mapping[str, Any]) -> bool:
        named = config.get("quant_method", "bitsandbytes") == "bitsandbytes"
        return named and bool(config.get("load_in_4bit", config.get("_load_in_4bit", False)))

    def check(self, config: Mapping[str, Any]) -> None:
        """Each weight carries all that its decoding depends on."""

    def decoders(self, config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> list[Decoder]:
        found: list[Decoder] = []
        for name in stored:
            weight, state, kind = name.partition(STATE)
            if state:
                found.append(_decoder(weight, kind, stored))
        consumed = {part.name for decoder in found for part in decoder.parts}
        orphans = [name for name in stored if name not in consumed and name.endswith(tuple(f".{p}" for p in PARTS))]
        if orphans:
            raise corrupt(orphans[0], "a quant_state beside it", f"{len(orphans)} tensors without one")
        return found


def _decoder(name: str, kind: str, stored: Mapping[str, TensorSpec]) -> FourBit:
    if kind not in TYPES:
        raise corrupt(name, f"a quant_state of {' or '.join(TYPES)}", kind)
    blob = stored[f"{name}{STATE}{kind}"]
    state = _read_state(name, blob)
    nested = state.nested_blocksize > 0
    wanted = {"": name} | {part: f"{name}.{part}" for part in (PARTS if nested else PARTS[:2])}
    missing = [tensor for tensor in wanted.values() if tensor not in stored]
    if missing:
        raise corrupt(name, ", ".join(wanted.values()), f"no {missing[0]}")
    specs = {part: stored[tensor] for part, tensor in wanted.items()}
    blocks = -(-state.count // state.blocksize)
    sizes = {"": ("bytes", specs[""].nbytes, -(-state.count // 2))}
    sizes["absmax"] = ("U8" if nested else "F32", math.prod(specs["absmax"].shape), blocks)
    sizes["quant_map"] = ("F32", math.prod(specs["quant_map"].shape), 16)
    if nested:
        outer = -(-blocks // state.nested_blocksize)
        sizes["nested_absmax"] = ("F32", math.prod(specs["nested_absmax"].shape), outer)
        sizes["nested_quant_map"] = ("F32", math.prod(specs["nested_quant_map"].shape), 256)
    for part, (dtype, have, want) in sizes.items():
        if have != want or dtype not in ("bytes", specs[part].dtype):
            raise corrupt(wanted[part], f"{want} {dtype} for a weight of {list(state.shape)}", str(specs[part].shape))
    return FourBit(
        name, state, specs[""], specs["absmax"], specs["quant_map"], blob,
        specs.get("nested_absmax"), specs.get("nested_quant_map"),
    )  # fmt: skip


def _read_state(name: str, blob: TensorSpec) -> State:
    """The JSON of a quant_state, every field checked: it comes from a stranger's file."""
    if blob.nbytes > MAX_STATE_BYTES:
        raise corrupt(name, f"a quant_state of at most {MAX_STATE_BYTES} bytes", blob.nbytes)
    try:
        fields = json.loads(bytes(blob.read_bytes(0, blob.nbytes)))
    except (ValueError, RecursionError) as error:
        raise corrupt(name, "a quant_state in JSON", str(error)) from None
    fields = fields if isinstance(fields, dict) else {}
    shape, dtype, blocksize = fields.get("shape"), fields.get("dtype"), fields.get("blocksize")
    nested, offset = fields.get("nested_blocksize", 0), fields.get("nested_offset", 0.0)
    if (
        not (isinstance(shape, list) and shape and all(type(size) is int and size > 0 for size in shape))
        or dtype not in FLOATS
        or type(blocksize) is not int
        or not 2 <= blocksize <= MAX_BLOCK
        or blocksize % 2
        or type(nested) is not int
        or not 0 <= nested <= MAX_BLOCK
        or type(offset) not in (int, float)
        or not abs(offset) < LARGEST  # neither of infinity, NaN and integers of hundreds of digits
    ):
        raise corrupt(name, "shape, dtype and an even blocksize in its quant_state", fields)
    return State(tuple(shape), FLOATS[dtype], blocksize, nested, offset)

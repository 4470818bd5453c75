"""MXFP4 (OCP Microscaling Formats 1.0) as gpt-oss publishes its experts.

    W_blocks   U8 [experts, out, in / 32, 16]   two numbers a byte, the first in the low half
    W_scales   U8 [experts, out, in / 32]       exponents, 127 added

    W[e, i, o] = value of the half byte · 2^(exponent − 127), rounded to bf16

The unquantised model keeps its experts as [in, out], so that decoding transposes; a row of W is one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.quantised import Decoder, corrupt, scheme
from composer.quantised.packing import look_up, rounded
from composer.tensors import TensorSpec

__all__ = ["Mxfp4"]

BLOCKS, SCALES = "_blocks", "_scales"
BYTES = 16  # of a block: 32 numbers
BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1; the highest bit of a half byte is the sign


@dataclass(frozen=True, slots=True)
class Experts:
    """The same matrix of all experts."""

    name: str
    blocks: TensorSpec
    scales: TensorSpec

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, groups, _ = self.blocks.shape
        return (experts, groups * BYTES * 2, outputs)

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return (self.blocks, self.scales)

    def rows(self, start: int, stop: int) -> np.ndarray:
        _, inputs, outputs = self.shape
        values = np.empty((stop - start, inputs, outputs), np.float32)
        for expert in range(start, stop):
            values[expert - start] = self._expert(expert)
        return values.reshape(stop - start, inputs * outputs)

    def _expert(self, expert: int) -> np.ndarray:
        """One expert as float32 [in, out]."""
        _, outputs, groups, size = self.blocks.shape
        count = outputs * groups
        halves = np.frombuffer(self.blocks.read_bytes(expert * count * size, (expert + 1) * count * size), np.uint8)
        exponents = np.frombuffer(self.scales.read_bytes(expert * count, (expert + 1) * count), np.uint8)
        table = np.array([*MAGNITUDES, *(-value for value in MAGNITUDES)], np.float32)
        numbers = look_up(table, halves, high_first=False).reshape(count, size * 2)
        with np.errstate(over="ignore"):
            numbers *= np.ldexp(np.float32(1), exponents.astype(np.int32) - BIAS)[:, None]
        return rounded(numbers, "BF16").reshape(outputs, groups * size * 2).T


@scheme
class Mxfp4:
    """quant_method "mxfp4"."""

    name = "mxfp4"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "mxfp4"

    def check(self, config: Mapping[str, Any]) -> None:
        """The format has no variants."""

    def decoders(self, config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> list[Decoder]:
        names = [name.removesuffix(BLOCKS) for name in stored if name.endswith(BLOCKS)]
        orphans = [name for name in stored if name.endswith(SCALES) and name.removesuffix(SCALES) not in names]
        if orphans:
            raise corrupt(orphans[0], "the blocks of its tensor", "none")
        return [_decoder(name, stored) for name in names]


def _decoder(name: str, stored: Mapping[str, TensorSpec]) -> Experts:
    blocks, scales = stored[f"{name}{BLOCKS}"], stored.get(f"{name}{SCALES}")
    if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != BYTES or 0 in blocks.shape:
        raise corrupt(blocks.name, f"U8 [experts, out, groups, {BYTES}]", f"{blocks.dtype} {list(blocks.shape)}")
    if scales is None or scales.dtype != "U8" or scales.shape != blocks.shape[:3]:
        raise corrupt(f"{name}{SCALES}", f"U8 {list(blocks.shape[:3])}", scales and list(scales.shape))
    return Experts(name, blocks, scales)

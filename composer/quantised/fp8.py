"""FP8 with a scale a block, as DeepSeek-V3 and Qwen3 publish it (arXiv:2412.19437 §3.3).

    W.weight             F8_E4M3 [out, in]
    W.weight_scale_inv   F32 or BF16 [ceil(out / bm), ceil(in / bn)], or one number; quantization_config has
                         weight_block_size [bm, bn]

    value = weight · scale of its block, rounded to float32

The name says `inv` because it is the inverse of what the weight was multiplied with: decoding multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.quantised import Decoder, corrupt, refuse, scheme
from composer.quantised.packing import rounded
from composer.tensors import DTYPES, FLOAT_DTYPES, TensorSpec

__all__ = ["Fp8", "Fp8Blocks"]

SCALE = "_scale_inv"
BLOCK = (128, 128)
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """One weight of 8-bit numbers; `block` is (rows, columns) that share a scale; the product rounds to `dtype`."""

    weight: TensorSpec
    scale: TensorSpec
    block: tuple[int, int]
    dtype: str = "F32"

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return (self.weight, self.scale)

    def rows(self, start: int, stop: int) -> np.ndarray:
        columns = self.shape[1]
        stored = np.frombuffer(self.weight.read_bytes(start * columns, stop * columns), DTYPES[self.weight.dtype])
        values = stored.reshape(stop - start, columns).astype(np.float32)
        height, width = self.block
        across = -(-columns // width)
        first, last = start // height, -(-stop // height)
        size = DTYPES[self.scale.dtype].itemsize * across
        scales = np.frombuffer(self.scale.read_bytes(first * size, last * size), DTYPES[self.scale.dtype])
        scales = scales.astype(np.float32).reshape(last - first, across)
        if across > 1:
            scales = np.repeat(scales, width, axis=1)[:, :columns]
        if height == 1:
            values *= scales
        else:
            for row in range(first, last):
                part = values[max(row * height - start, 0) : (row + 1) * height - start]
                part *= scales[row - first]
        return rounded(values, self.dtype)


@scheme
class Fp8:
    """quant_method "fp8"."""

    name = "fp8"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "fp8"

    def check(self, config: Mapping[str, Any]) -> None:
        block = config.get("weight_block_size")
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
        ):
            raise refuse("fp8: weight_block_size is not two sizes", expected="[128, 128]", found=block)
        scheme_of_activations = config.get("activation_scheme", "dynamic")
        if scheme_of_activations != "dynamic":
            raise refuse(
                f"fp8: activation_scheme {scheme_of_activations!r} stores scales of activations that a float model has "
                "no place for",
                expected="dynamic",
                found=scheme_of_activations,
            )

    def decoders(self, config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> list[Decoder]:
        block = tuple(config.get("weight_block_size") or BLOCK)
        found: list[Decoder] = [
            _decoder(name.removesuffix(SCALE), block, stored) for name in stored if name.endswith(SCALE)
        ]
        decoded = {decoder.name for decoder in found}
        bare = [name for name, spec in stored.items() if spec.dtype in FP8_DTYPES and name not in decoded]
        if bare:
            raise corrupt(bare[0], f"{bare[0]}{SCALE} beside it", "none")
        return found


def _decoder(name: str, block: tuple[int, int], stored: Mapping[str, TensorSpec]) -> Fp8Blocks:
    weight, scale = stored.get(name), stored[f"{name}{SCALE}"]
    if weight is None or weight.dtype not in FP8_DTYPES or len(weight.shape) != 2 or 0 in weight.shape:
        raise corrupt(name, "F8_E4M3 of two dimensions", weight and f"{weight.dtype} {list(weight.shape)}")
    if scale.shape in ((), (1,)):
        block = (weight.shape[0], weight.shape[1])
    elif scale.shape != tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True)):
        raise corrupt(scale.name, f"a scale for each block of {list(block)}", list(scale.shape))
    if scale.dtype not in FLOAT_DTYPES:
        raise corrupt(scale.name, sorted(FLOAT_DTYPES), scale.dtype)
    return Fp8Blocks(weight, scale, block)

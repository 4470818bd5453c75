"""bitsandbytes LLM.int8 (arXiv:2208.07339): one scale a row.

    W.weight          I8 [out, in]
    W.SCB             F32 [out], the largest magnitude of each row
    W.weight_format   U8, 0: rows in order (the only layout that is still written)

    value = weight · SCB · (1/127)       in that order, each product rounded to float32

Outliers are split off the activations, so that a weight has no part in another dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from composer.quantised import Decoder, corrupt, refuse, scheme
from composer.quantised.packing import rounded
from composer.tensors import ArraySpec, TensorSpec

__all__ = ["BitsAndBytesInt8"]

SCALE, FORMAT, WEIGHT = ".SCB", ".weight_format", ".weight"


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """One weight."""

    weight: TensorSpec
    scale: TensorSpec
    layout: TensorSpec | None

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return (self.weight, self.scale) if self.layout is None else (self.weight, self.scale, self.layout)

    def rows(self, start: int, stop: int) -> np.ndarray:
        columns = self.shape[1]
        stored = np.frombuffer(self.weight.read_bytes(start * columns, stop * columns), np.int8)
        scale = np.frombuffer(self.scale.read_bytes(start * 4, stop * 4), np.float32)
        values = stored.reshape(stop - start, columns).astype(np.float32)
        values *= scale[:, None]
        values *= np.float32(1 / 127)
        return values

    def encoder(self) -> Int8Encoder:
        return Int8Encoder(self)


class Int8Encoder:
    """Each row times 127 / its largest magnitude, rounded half to even: int8_vectorwise_quant, bit for bit."""

    dtype = "F16"  # bitsandbytes casts to it first, whatever the model's own is
    step = 1

    def __init__(self, layer: Int8Rows) -> None:
        self._layer = layer
        self._weight, self._scale = np.zeros(layer.shape, np.int8), np.zeros(layer.shape[0], np.float32)

    def encode(self, start: int, values: np.ndarray) -> None:
        numbers = rounded(values, self.dtype)
        absmax = np.abs(numbers).max(axis=1)
        factor = np.divide(np.float32(127), absmax, out=np.zeros_like(absmax), where=absmax > 0)
        self._weight[start : start + len(numbers)] = np.rint(numbers * factor[:, None])
        self._scale[start : start + len(numbers)] = absmax

    def finish(self) -> Int8Rows:
        return replace(
            self._layer,
            weight=ArraySpec.like(self._layer.weight, self._weight),
            scale=ArraySpec.like(self._layer.scale, self._scale),
        )


@scheme
class BitsAndBytesInt8:
    """8-bit bases, as save_pretrained writes them."""

    name = "bitsandbytes int8"

    def matches(self, config: Mapping[str, Any]) -> bool:
        named = config.get("quant_method", "bitsandbytes") == "bitsandbytes"
        return named and bool(config.get("load_in_8bit", config.get("_load_in_8bit", False)))

    def check(self, config: Mapping[str, Any]) -> None:
        """Outliers are split off the activations, not off the weights: the options do not matter here."""

    def decoders(self, config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> list[Decoder]:
        layers = [name.removesuffix(SCALE) for name in stored if name.endswith(SCALE)]
        orphans = [name for name in stored if name.endswith(FORMAT) and name.removesuffix(FORMAT) not in layers]
        if orphans:
            raise corrupt(orphans[0], "the scales (SCB) of its layer", "none")
        return [_decoder(layer, stored) for layer in layers]


def _decoder(layer: str, stored: Mapping[str, TensorSpec]) -> Int8Rows:
    weight, scale, layout = (stored.get(f"{layer}{suffix}") for suffix in (WEIGHT, SCALE, FORMAT))
    assert scale is not None
    if weight is None or weight.dtype != "I8" or len(weight.shape) != 2:
        raise corrupt(f"{layer}{WEIGHT}", "I8 of two dimensions", weight and f"{weight.dtype} {list(weight.shape)}")
    if scale.dtype != "F32" or scale.nbytes != 4 * weight.shape[0]:
        raise corrupt(scale.name, f"F32 [{weight.shape[0]}]", f"{scale.dtype} {list(scale.shape)}")
    if layout is not None and (layout.nbytes != 1 or layout.read_bytes(0, 1) != b"\0"):
        raise refuse(
            f"{layer}: its int8 weight is in a layout for one kind of GPU", expected="weight_format 0 (rows)",
            found=layout.name,
        )  # fmt: skip
    return Int8Rows(weight, scale, layout)

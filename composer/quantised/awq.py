"""AWQ (arXiv:2306.00978) as AutoAWQ writes it for its GEMM kernel, 4 bits.

    W.qweight   I32 [in, out / 8]       along the outputs
    W.qzeros    I32 [groups, out / 8]
    W.scales    F16 [groups, out]

    W[o, i] = (q[i, o] − zero[g, o]) · scale[g, o]   with g = i // group size

From the lowest bits up, a word holds its outputs 0, 2, 4, 6, 1, 3, 5, 7. Where AWQ scales an activation (`act.scales`,
models with a plain GELU) the layers are not those of the unquantised model, and such a base is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.quantised import Decoder, corrupt, refuse, scheme
from composer.quantised.packing import read_columns, scaled, unpack
from composer.tensors import FLOAT_DTYPES, TensorSpec

__all__ = ["Awq"]

BITS, COUNT = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True, slots=True)
class AwqLayer:
    """One weight, stored with its inputs as rows; it decodes to [out, in]."""

    name: str
    qweight: TensorSpec
    qzeros: TensorSpec
    scales: TensorSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.qweight.shape[1] * COUNT, self.qweight.shape[0])

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return (self.qweight, self.qzeros, self.scales)

    def rows(self, start: int, stop: int) -> np.ndarray:
        inputs, groups = self.qweight.shape[0], self.scales.shape[0]
        first, last = start // COUNT, -(-stop // COUNT)
        numbers, zeros = (
            unpack(read_columns(spec, first, last), BITS, ORDER).reshape(spec.shape[0], -1)[
                :, start - first * COUNT : stop - first * COUNT
            ]
            for spec in (self.qweight, self.qzeros)
        )
        scales = read_columns(self.scales, start, stop)
        grouped = numbers.reshape(groups, inputs // groups, stop - start)
        values = scaled(grouped, zeros[:, None], scales[:, None], self.scales.dtype)
        return np.ascontiguousarray(values.reshape(inputs, stop - start).T)


@scheme
class Awq:
    """quant_method "awq"."""

    name = "awq"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "awq"

    def check(self, config: Mapping[str, Any]) -> None:
        if config.get("bits", config.get("w_bit")) != BITS:
            raise refuse(f"awq with {config.get('bits')} bits cannot be read", expected=BITS, found=config.get("bits"))
        layout = str(config.get("version") or config.get("format") or "gemm").lower()
        if layout != "gemm":
            raise refuse(f"awq in the layout {layout!r} cannot be read", expected="gemm", found=layout)

    def decoders(self, config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> list[Decoder]:
        layers = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
        orphans = [name for name in stored if name.endswith((".qzeros", ".scales"))
                   and name.rpartition(".")[0] not in layers]  # fmt: skip
        if orphans:
            raise refuse(
                f"{orphans[0]}: awq scales an activation here, which the unquantised model has no place for",
                expected="scales of quantised layers only",
                found=orphans[:20],
            )
        return [_decoder(layer, stored) for layer in layers]


def _decoder(layer: str, stored: Mapping[str, TensorSpec]) -> AwqLayer:
    qweight, qzeros, scales = (stored.get(f"{layer}.{part}") for part in PARTS)
    if qweight is None or qzeros is None or scales is None:
        raise corrupt(layer, "qweight, qzeros and scales", [name for name in stored if name.startswith(f"{layer}.")])
    if any(spec.dtype != "I32" or len(spec.shape) != 2 or 0 in spec.shape for spec in (qweight, qzeros)):
        raise corrupt(layer, "qweight and qzeros in I32 of two dimensions", [qweight.dtype, qzeros.dtype])
    (inputs, words), groups = qweight.shape, qzeros.shape[0]
    if qzeros.shape[1] != words or inputs % groups:
        raise corrupt(qzeros.name, f"[groups, {words}] with groups that divide {inputs}", list(qzeros.shape))
    if scales.dtype not in FLOAT_DTYPES or scales.shape != (groups, words * COUNT):
        raise corrupt(scales.name, f"a scale for each of [{groups}, {words * COUNT}]", list(scales.shape))
    return AwqLayer(f"{layer}.weight", qweight, qzeros, scales)

"""GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel write it, with and without desc_act; 2, 4 and 8 bits.

    W.qweight   I32 [in · bits / 32, out]       along the inputs, the first in the lowest bits
    W.qzeros    I32 [groups, out · bits / 32]   along the outputs
    W.scales    F16 [groups, out]
    W.g_idx     I32 [in]                        the group of each input; without it, groups of adjacent inputs

    W[o, i] = (q[i, o] − zero[g, o]) · scale[g, o]   with g = g_idx[i]

The format "gptq" stores zero − 1 in as many bits, so that 0 is stored as all ones; "gptq_v2" stores zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.quantised import Decoder, corrupt, refuse, scheme
from composer.quantised.packing import WORD, groups_of, read_columns, scaled, unpack
from composer.tensors import FLOAT_DTYPES, TensorSpec

__all__ = ["Gptq"]

BITS = (2, 4, 8)
FORMATS = {"gptq": 1, "gptq_v2": 0}  # what was subtracted from a stored zero
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True)
class GptqLayer:
    """One weight, stored with its inputs as rows; it decodes to [out, in]."""

    name: str
    bits: int
    offset: int
    qweight: TensorSpec
    qzeros: TensorSpec
    scales: TensorSpec
    g_idx: TensorSpec | None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.qweight.shape[1], self.qweight.shape[0] * WORD // self.bits)

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        own = (self.qweight, self.qzeros, self.scales)
        return own if self.g_idx is None else (*own, self.g_idx)

    def rows(self, start: int, stop: int) -> np.ndarray:
        inputs, groups, count = self.shape[1], self.scales.shape[0], WORD // self.bits
        words = read_columns(self.qweight, start, stop)
        numbers = unpack(words, self.bits).transpose(0, 2, 1).reshape(inputs, stop - start)
        first, last = start // count, -(-stop // count)
        zeros = unpack(read_columns(self.qzeros, first, last), self.bits).reshape(groups, -1)
        zeros = (zeros[:, start - first * count : stop - first * count] + self.offset) & ((1 << self.bits) - 1)
        group = groups_of(self.g_idx, inputs, groups)
        scales = read_columns(self.scales, start, stop)
        return np.ascontiguousarray(scaled(numbers, zeros[group], scales[group], self.scales.dtype).T)


@scheme
class Gptq:
    """quant_method "gptq"."""

    name = "gptq"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "gptq"

    def check(self, config: Mapping[str, Any]) -> None:
        bits, stored = config.get("bits"), _format(config)
        if type(bits) is not int or bits not in BITS:
            raise refuse(f"gptq with {bits} bits cannot be read", expected=BITS, found=bits)
        if stored not in tuple(FORMATS) or config.get("is_marlin_format"):
            raise refuse(f"gptq in the format {stored!r} cannot be read", expected=sorted(FORMATS), found=stored)
        for option in ("adapter", "rotation"):
            if config.get(option):
                raise refuse(f"gptq: {option} changes what the layers compute", expected="none", found=config[option])

    def decoders(self, config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> list[Decoder]:
        layers = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
        orphans = [name for name in stored if name.endswith(tuple(f".{part}" for part in PARTS[1:]))
                   and name.rpartition(".")[0] not in layers]  # fmt: skip
        if orphans:
            raise corrupt(orphans[0], "the qweight of its layer", "none")
        return [_decoder(layer, config["bits"], FORMATS[_format(config)], stored) for layer in layers]


def _format(config: Mapping[str, Any]) -> Any:
    return config.get("checkpoint_format") or config.get("format") or "gptq"


def _decoder(layer: str, bits: int, offset: int, stored: Mapping[str, TensorSpec]) -> GptqLayer:
    qweight, qzeros, scales, g_idx = (stored.get(f"{layer}.{part}") for part in PARTS)
    if qweight is None or qzeros is None or scales is None:
        raise corrupt(layer, "qweight, qzeros and scales", [name for name in stored if name.startswith(f"{layer}.")])
    if any(spec.dtype != "I32" or len(spec.shape) != 2 or 0 in spec.shape for spec in (qweight, qzeros)):
        raise corrupt(layer, "qweight and qzeros in I32 of two dimensions", [qweight.dtype, qzeros.dtype])
    inputs, outputs, groups = qweight.shape[0] * WORD // bits, qweight.shape[1], qzeros.shape[0]
    if scales.dtype not in FLOAT_DTYPES or scales.shape != (groups, outputs):
        raise corrupt(scales.name, f"a scale for each of [{groups}, {outputs}]", list(scales.shape))
    if qzeros.shape[1] != -(-outputs * bits // WORD):
        raise corrupt(qzeros.name, f"{outputs} zeros of {bits} bits a row", list(qzeros.shape))
    if g_idx is not None and (g_idx.dtype not in ("I32", "I64") or g_idx.shape != (inputs,)):
        raise corrupt(g_idx.name, f"I32 [{inputs}] ({bits} bits as config.json says)", list(g_idx.shape))
    return GptqLayer(f"{layer}.weight", bits, offset, qweight, qzeros, scales, g_idx)

"""compressed-tensors, format "pack-quantized" (llm-compressor, vLLM): weights of 4 or 8 bits, activations left alone.

    W.weight_packed       I32 [out, ceil(in · bits / 32)]       along the inputs, the first in the lowest bits
    W.weight_scale        [out, groups], [out, 1] or [1]
    W.weight_shape        I64 [2]: out, in
    W.weight_zero_point   I32 [ceil(out · bits / 32), groups]   asymmetric only; packed along the outputs
    W.weight_g_idx        I32 [in]                              actorder "group" only: the group of each input

    W[o, i] = (q − zero) · scale   of the group of i; both integers are stored with 2^(bits − 1) added

Source: https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.quantised import Decoder, corrupt, refuse, scheme
from composer.quantised.packing import WORD, groups_of, read_rows, scaled, unpack
from composer.tensors import FLOAT_DTYPES, TensorSpec

__all__ = ["EIGHT_BIT_FORMATS", "CompressedTensors", "weight_groups"]

FORMAT = "pack-quantized"
EIGHT_BIT_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
BITS = (4, 8)
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One weight."""

    name: str
    shape: tuple[int, ...]
    bits: int
    packed: TensorSpec
    scale: TensorSpec
    size: TensorSpec
    zero_point: TensorSpec | None
    g_idx: TensorSpec | None

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        own = (self.packed, self.scale, self.size, self.zero_point, self.g_idx)
        return tuple(part for part in own if part is not None)

    def rows(self, start: int, stop: int) -> np.ndarray:
        columns = self.shape[1]
        numbers = unpack(read_rows(self.packed, start, stop), self.bits).reshape(stop - start, -1)[:, :columns]
        if len(self.scale.shape) == 2:
            scales = read_rows(self.scale, start, stop)
        else:
            scales = np.broadcast_to(self.scale.read().reshape(1, 1), (stop - start, 1))
        zeros: np.ndarray | int = 1 << (self.bits - 1)
        if self.zero_point is not None:
            count = WORD // self.bits
            first, last = start // count, -(-stop // count)
            stored = unpack(read_rows(self.zero_point, first, last), self.bits).transpose(0, 2, 1)
            zeros = stored.reshape(-1, stored.shape[2])[start - first * count : stop - first * count]
        groups = scales.shape[1]
        if groups > 1:
            group = groups_of(self.g_idx, columns, groups)
            scales = scales[:, group]
            zeros = zeros if isinstance(zeros, int) else zeros[:, group]
        return scaled(numbers, zeros, scales, self.scale.dtype)


@scheme
class CompressedTensors:
    """quant_method "compressed-tensors"."""

    name = "compressed-tensors"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "compressed-tensors" and config.get("format") not in EIGHT_BIT_FORMATS

    def check(self, config: Mapping[str, Any]) -> None:
        groups = weight_groups(config, (FORMAT,))
        for group in groups:
            weights = group["weights"]
            kind = (weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy"))
            if kind[0] != "int" or type(kind[1]) is not int or kind[1] not in BITS or kind[2] not in STRATEGIES:
                raise refuse("compressed-tensors: these weights are not read", expected=["int", BITS, STRATEGIES],
                             found=kind)  # fmt: skip
            if group.get("input_activations") or group.get("output_activations"):
                raise refuse("compressed-tensors: quantised activations are not read", expected="weights only",
                             found=group)  # fmt: skip
        if len({group["weights"]["num_bits"] for group in groups}) > 1:
            raise refuse("compressed-tensors: several widths in one model are not read", expected="one", found=groups)

    def decoders(self, config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> list[Decoder]:
        weights = [group["weights"] for group in config["config_groups"].values()]
        bits, asymmetric = weights[0]["num_bits"], all(part.get("symmetric") is False for part in weights)
        layers = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
        orphans = [name for name in stored if name.endswith(tuple(f".{part}" for part in PARTS[1:]))
                   and name.rpartition(".")[0] not in layers]  # fmt: skip
        if orphans:
            raise corrupt(orphans[0], "the weight_packed of its layer", "none")
        return [_decoder(layer, bits, asymmetric, stored) for layer in layers]


def weight_groups(config: Mapping[str, Any], formats: tuple[str, ...]) -> list[dict[str, Any]]:
    """The config_groups, each with `weights`. Raises UnsupportedQuantisationError unless all are in `formats`."""
    named = config.get("config_groups")
    groups = list(named.values()) if isinstance(named, dict) else []
    described = [group for group in groups if isinstance(group, dict) and isinstance(group.get("weights"), dict)]
    if not groups or described != groups:
        raise refuse("compressed-tensors: config_groups says nothing of weights", expected="weights in each group",
                     found=named)  # fmt: skip
    found = [group.get("format") or config.get("format") for group in groups]
    if any(name not in formats for name in found):
        raise refuse(f"compressed-tensors in the format {found[0]!r} cannot be read",
                     expected=(FORMAT, *EIGHT_BIT_FORMATS), found=found)  # fmt: skip
    for option in ("transform_config", "kv_cache_scheme", "sparsity_config"):
        if config.get(option):
            raise refuse(f"compressed-tensors: {option} is not read", expected="none", found=config[option])
    return groups


def _decoder(layer: str, bits: int, asymmetric: bool, stored: Mapping[str, TensorSpec]) -> PackedLayer:
    packed, scale, size, zero_point, g_idx = (stored.get(f"{layer}.{part}") for part in PARTS)
    if packed is None or scale is None or size is None or packed.dtype != "I32" or len(packed.shape) != 2:
        raise corrupt(layer, "weight_packed (I32 of two dimensions), weight_scale and weight_shape", "less")
    if size.dtype not in ("I32", "I64") or size.shape != (2,):
        raise corrupt(size.name, "two integers: out, in", list(size.shape))
    rows, columns = (int(number) for number in size.read())
    if rows < 1 or columns < 1 or packed.shape != (rows, -(-columns * bits // WORD)):
        raise corrupt(packed.name, f"[{rows}, {columns}] of {bits} bits, as weight_shape says", list(packed.shape))
    if scale.dtype not in FLOAT_DTYPES or not (
        scale.shape in ((), (1,)) or (len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] > 0)
    ):
        raise corrupt(scale.name, f"[{rows}, groups] or one number", list(scale.shape))
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if asymmetric and zero_point is None:
        raise corrupt(layer, "weight_zero_point, as config.json says", "none")
    if zero_point is not None and (
        zero_point.dtype != "I32" or zero_point.shape != (-(-rows * bits // WORD), groups) or len(scale.shape) != 2
    ):
        raise corrupt(zero_point.name, f"{rows} zeros of {bits} bits for {groups} groups", list(zero_point.shape))
    if g_idx is not None and (g_idx.dtype not in ("I32", "I64") or g_idx.shape != (columns,)):
        raise corrupt(g_idx.name, f"I32 [{columns}]", list(g_idx.shape))
    return PackedLayer(f"{layer}.weight", (rows, columns), bits, packed, scale, size, zero_point, g_idx)

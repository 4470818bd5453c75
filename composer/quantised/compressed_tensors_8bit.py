"""compressed-tensors, formats "float-quantized" and "int-quantized": FP8 and int8 weights, as vLLM serves them.

    W.weight         F8_E4M3 or I8 [out, in]
    W.weight_scale   [out, 1], [1], or one a block [ceil(out / bm), ceil(in / bn)] with block_structure [bm, bn]

    W[o, i] = number · scale, rounded to the dtype of the scales

Such models also round their activations while they run. Where that needs nothing stored ("dynamic") the unquantised
model simply does not; stored scales of activations have no place in it and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer.quantised import Decoder, corrupt, refuse, scheme
from composer.quantised.compressed_tensors import EIGHT_BIT_FORMATS, weight_groups
from composer.quantised.fp8 import Fp8Blocks
from composer.tensors import FLOAT_DTYPES, TensorSpec

__all__ = ["CompressedTensors8Bit"]

SCALE = "_scale"
STORED = ("F8_E4M3", "I8")
STRATEGIES = ("tensor", "channel", "block")


@scheme
class CompressedTensors8Bit:
    """quant_method "compressed-tensors", weights that are not packed."""

    name = "compressed-tensors 8"

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "compressed-tensors" and config.get("format") in EIGHT_BIT_FORMATS

    def check(self, config: Mapping[str, Any]) -> None:
        for group in weight_groups(config, EIGHT_BIT_FORMATS):
            weights = group["weights"]
            kind = (weights.get("num_bits"), weights.get("strategy"), weights.get("symmetric", True))
            if kind[0] != 8 or kind[1] not in STRATEGIES or kind[2] is not True:
                raise refuse("compressed-tensors: these weights are not read", expected=[8, STRATEGIES, "symmetric"],
                             found=kind)  # fmt: skip
            if kind[1] == "block" and _block(weights) is None:
                raise refuse("compressed-tensors: block_structure is not two sizes", expected="[128, 128]",
                             found=weights.get("block_structure"))  # fmt: skip
            for option in ("input_activations", "output_activations"):
                activations = group.get(option)
                if activations and not (isinstance(activations, dict) and activations.get("dynamic") is True):
                    raise refuse(f"compressed-tensors: stored scales of {option} are not read", expected="dynamic ones",
                                 found=activations)  # fmt: skip

    def decoders(self, config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> list[Decoder]:
        blocks = [_block(group["weights"]) for group in weight_groups(config, EIGHT_BIT_FORMATS)]
        block = next((found for found in blocks if found), None)
        layers = [name for name, spec in stored.items() if name.endswith(".weight") and spec.dtype in STORED]
        orphans = [name for name in stored if name.endswith((".weight_scale", ".weight_zero_point"))
                   and (name.endswith("_zero_point") or name.removesuffix(SCALE) not in layers)]  # fmt: skip
        if orphans:
            raise corrupt(orphans[0], f"a weight of {' or '.join(STORED)} with symmetric scales", "none")
        return [_decoder(name, block, stored) for name in layers]


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    block = weights.get("block_structure")
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return (block[0], block[1])
    return None


def _decoder(name: str, block: tuple[int, int] | None, stored: Mapping[str, TensorSpec]) -> Fp8Blocks:
    weight, scale = stored[name], stored.get(f"{name}{SCALE}")
    if scale is None or scale.dtype not in FLOAT_DTYPES or len(weight.shape) != 2 or 0 in weight.shape:
        raise corrupt(name, f"two dimensions, and scales in {name}{SCALE}", scale and scale.dtype)
    rows, columns = weight.shape
    if scale.shape in ((), (1,)):
        found = (rows, columns)
    elif scale.shape == (rows, 1):
        found = (1, columns)
    elif block and scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
        found = block
    else:
        raise corrupt(scale.name, f"[{rows}, 1], one number, or one a block", list(scale.shape))
    return Fp8Blocks(weight, scale, found, scale.dtype)

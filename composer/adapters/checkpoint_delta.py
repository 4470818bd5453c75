"""A full fine-tune as its difference from the base, bit for bit (`registry delta make`).

adapter_config.json         tensors: {name: {dtype, shape}}, shards and files: what restores the checkpoint's files
<name>.bits    U8 [n]       the XOR with the base's bits, compressed      W' = W xor bits; at weight w: W + w·(W' − W)
<name>.rows    U32 [rows]   checksums of the base's rows

A tensor that the fine-tune left alone is not there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from composer.adapters import Signature, Target, adapter_kind, refuse
from composer.adapters._common import damaged
from composer.deltas import Delta
from composer.deltas_checkpoint import BITS, CheckpointDelta
from composer.tensors import SafetensorsHeader

__all__ = ["PEFT_TYPE", "VERSION", "CheckpointDeltaKind"]

PEFT_TYPE = "CHECKPOINT_DELTA"
VERSION = 1


@adapter_kind
class CheckpointDeltaKind:
    """Differences of whole tensors; it is this project's own kind, not one of PEFT's."""

    name = "checkpoint-delta"
    peft_types = (PEFT_TYPE,)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise UnsupportedAdapterError for another version, CorruptFileError where config and tensors disagree."""
        if config.get("format_version") != VERSION:
            raise refuse(
                f"a checkpoint delta of format {config.get('format_version')!r} cannot be read",
                expected=VERSION,
                found=config.get("format_version"),
                remedy="make it again with this version",
            )
        tensors = config.get("tensors")
        if not isinstance(tensors, dict) or not all(map(_is_entry, tensors.values())):
            raise damaged("adapter_config.json: tensors", "{name: {dtype, shape}}", str(tensors)[:200])
        expected = {f"{name}.{part}" for name in tensors for part in ("bits", "rows")}
        if expected != set(header.tensors):
            wrong = sorted(expected ^ set(header.tensors))
            raise damaged("adapter_config.json and the tensors disagree", "bits and rows of each tensor", wrong[:5])
        for name, entry in tensors.items():
            bits, rows = header.tensors[f"{name}.bits"], header.tensors[f"{name}.rows"]
            count = entry["shape"][0] if entry["shape"] else 1
            if (bits.dtype, len(bits.shape), rows.dtype, rows.shape) != ("U8", 1, "U32", (count,)):
                raise damaged(f"{name}: bits and rows", f"U8 [n] and U32 [{count}]", [bits.dtype, rows.dtype])

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """Each tensor in its own shape; its parameters are the numbers that they hold."""
        tensors = config["tensors"]
        modules = {name.split(".")[-2] for name in tensors if "." in name}
        return Signature(
            kind=self.name,
            targets=tuple(Target(name, tuple(entry["shape"])) for name, entry in tensors.items()),
            parameters=sum(math.prod(entry["shape"]) for entry in tensors.values()),
            target_modules=tuple(sorted(module for module in modules if not module.isdigit())),
        )

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """One CheckpointDelta a tensor."""
        return [
            CheckpointDelta(
                names[name],
                header.tensors[f"{name}.bits"],
                header.tensors[f"{name}.rows"],
                entry["dtype"],
                tuple(entry["shape"]),
            )
            for name, entry in config["tensors"].items()
        ]


def _is_entry(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape"} or value["dtype"] not in BITS:
        return False
    shape = value["shape"]
    return isinstance(shape, list) and all(type(size) is int and 0 < size < 2**40 for size in shape)

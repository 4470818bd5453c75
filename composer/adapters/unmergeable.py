"""Kinds of adapters that are neither a change of weights nor an addition: recognised, and refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer.adapters import Signature, adapter_kind, refuse
from composer.deltas import Delta
from composer.tensors import SafetensorsHeader

__all__ = ["REASONS", "Unmergeable"]

_ROUTED = "which of its parts act depends on the input, and one weight cannot"
REASONS = {
    "ADAPTION_PROMPT": "it adds a gated attention over trained vectors to the layers",
    "XLORA": _ROUTED,
    "POLY": _ROUTED,
    "LILY": _ROUTED,
}


@adapter_kind
class Unmergeable:
    """Always refused by `check`, so the rest is never reached."""

    name = "unmergeable"
    peft_types = tuple(REASONS)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise UnsupportedAdapterError with the reason and what would work."""
        found = config["peft_type"]
        raise refuse(
            f"{found} cannot be merged into weights: {REASONS[found]}",
            expected="an adapter that changes weights, such as LoRA",
            found=found,
            remedy="serve the base with this adapter loaded by PEFT, or train a LoRA on the same data",
        )

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """Raises UnsupportedAdapterError."""
        self.check(config, header)
        raise AssertionError("check refuses every adapter of these kinds")

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """Raises UnsupportedAdapterError."""
        self.check(config, header)
        raise AssertionError("check refuses every adapter of these kinds")

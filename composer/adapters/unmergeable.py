"""Adapters that are neither a change of weights nor an addition, or whose files alone do not tell: refused by name.

REASONS    peft_type: why no weight of the base can hold it
UNTOLD     peft_type: what a merge needs and the file does not have, so that only the trainer can make it
SWITCHES   a field that adapter_config.json of a LoRA sets: why that LoRA is no change of weights to be read here
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer.adapters import Signature, adapter_kind, refuse
from composer.deltas import Delta
from composer.tensors import SafetensorsHeader

__all__ = ["REASONS", "SWITCHES", "UNTOLD", "Unmergeable", "UnmergeableLora"]

_ROUTED = "which of its parts act depends on the input, and one weight cannot"
REASONS = {
    "ADAPTION_PROMPT": "it adds a gated attention over trained vectors to the layers",
    "XLORA": _ROUTED,
    "POLY": _ROUTED,
    "LILY": _ROUTED,
    "SHADOW": "a second, smaller network runs beside the layers and corrects their inputs",
}
UNTOLD = {
    "ADAMSS": "which rows of a weight its parts change is a clustering that PEFT computes anew on loading",
    "PSOFT": "its numbers are relative to singular vectors of the base, whose signs depend on the library that "
    "computes them",
}
SWITCHES = {
    "arrow_config": _ROUTED,
    "alora_invocation_tokens": "an activated LoRA acts only on the tokens after its invocation",
    "use_qalora": "QALoRA averages groups of a quantised layer's inputs, which PEFT does not merge either",
    "megatron_config": "Megatron's parallel layers hold their own parts of a module's factors",
}


@adapter_kind
class Unmergeable:
    """Always refused by `check`, so the rest is never reached."""

    name = "unmergeable"
    peft_types = (*REASONS, *UNTOLD)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise UnsupportedAdapterError with the reason and what would work."""
        found = config["peft_type"]
        if found in UNTOLD:
            raise refuse(
                f"{found} cannot be merged from its file: {UNTOLD[found]}",
                expected="an adapter that says all of its change, such as LoRA",
                found=found,
                remedy="merge it with PEFT's merge_and_unload where it was trained, and publish the result as a "
                "delta ('registry delta make') or as a LoRA ('registry extract')",
            )
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


@adapter_kind
class UnmergeableLora(Unmergeable):
    """LoRAs that act on some inputs only; always refused."""

    name = "unmergeable-lora"
    peft_types = ("LORA",)
    switches = tuple(SWITCHES)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise UnsupportedAdapterError with the reason and what would work."""
        field = next(field for field in self.switches if config.get(field))
        raise refuse(
            f"a LoRA with {field} cannot be merged into weights: {SWITCHES[field]}",
            expected=f"{field} unset",
            found=config[field],
            remedy="serve the base with this adapter loaded by PEFT, or train a LoRA without it on the same data",
        )

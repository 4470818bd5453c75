"""Variants of LoRA that a field of its config switches on and that keep other tensors than plain LoRA."""

from __future__ import annotations

from typing import Any, ClassVar

from composer.adapters._lora_config import lora_scale
from composer.adapters._modules import ModuleKind, Parts, check_number
from composer.tensors import SafetensorsHeader

__all__ = ["A", "B", "LoraVariant", "pair_shape"]

A, B = "lora_A.weight", "lora_B.weight"


class LoraVariant(ModuleKind):
    """A kind of peft_type LORA: rank and alpha, their patterns and rsLoRA are as in plain LoRA."""

    peft_types = ("LORA",)
    switches: ClassVar[tuple[str, ...]]
    options: ClassVar = {
        "use_dora": (False, None),
        "lora_bias": (False, None),
        "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    }

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """As every kind, and the scale must follow from the config."""
        check_number(config, "r")
        check_number(config, "lora_alpha")
        super().check(config, header)
        for module, parts in self._own(header).items():
            lora_scale(config, module, parts[A].shape[0])


def pair_shape(parts: Parts) -> tuple[int, int] | None:
    """[out, in] of A [r, in] and B [out, r]; None where they have no common rank."""
    a, b = parts[A].shape, parts[B].shape
    return (b[0], a[1]) if len(a) == len(b) == 2 and a[0] == b[1] and 0 not in (*a, *b) else None

"""RandLoRA: a full-rank sum of scaled random bases that all modules share (arXiv:2502.00987; peft/tuners/randlora).

base_model.randlora_A [r, 1, min]    base_model.randlora_B [max, n, r]    largest sizes; a module takes the first
base_model.model.<module>.randlora_lambda [r, n]    randlora_gamma [n, min(out, in)]

D = B·(λ ⊙ A ⊙ γ), [max(out, in), min(out, in)]     W += alpha / r · D, transposed where out < in
PEFT lays B out as [n, r] and the scaled A as [r, n]: the product pairs them as they lie, and so do we.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind, refuse
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts, unfit
from composer.deltas import BlockDelta, read_array
from composer.product import product
from composer.tensors import SafetensorsHeader

__all__ = ["Randlora"]


@dataclass(frozen=True, slots=True)
class LoadedBases:
    """large [largest max, k] · small [k, min]: the base's shape says which side is which. Float32."""

    large: np.ndarray
    small: np.ndarray
    scale: np.float32

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        columns, least = base.shape[1], self.small.shape[1]
        if columns == least and stop <= len(self.large):
            return product(self.large[start:stop], self.small) * self.scale
        if columns < least or columns > len(self.large) or stop > least:
            raise unfit(
                "randlora", f"a weight whose smaller size is {least}, the larger at most {len(self.large)}", columns
            )
        left = np.ascontiguousarray(self.small[:, start:stop].T)
        return product(left, np.ascontiguousarray(self.large[:columns].T)) * self.scale


@adapter_kind
class Randlora(ModuleKind):
    """Scaled sums of shared random bases on linear (and Conv1D) weights."""

    name = "randlora"
    peft_types = ("RANDLORA",)
    parts = ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B")
    shared = ("randlora_A", "randlora_B")
    numbers = ("randlora_alpha",)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise UnsupportedAdapterError where the bases were not saved, else as every kind."""
        if config.get("save_projection") is False:
            raise refuse(
                "RANDLORA without its bases in the file is not supported",
                expected="save_projection=True",
                found=False,
                remedy="load it with PEFT, set save_projection=True in its config and save it again",
            )
        super().check(config, header)

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        shapes = {name: spec.shape for name, spec in parts.items()}
        scales, gamma, a, b = (shapes[name] for name in self.parts)
        fits = len(scales) == len(gamma) == 2 and len(a) == len(b) == 3 and 0 not in (*scales, *gamma, *a, *b)
        fits = fits and scales[0] == a[0] == b[2] == config.get("r") and scales[1] == gamma[0] <= b[1]
        if not fits or a[1] != 1 or gamma[1] > a[2]:
            found = {name: list(shape) for name, shape in shapes.items()}
            raise damaged(
                f"{module}: the parts of RandLoRA do not fit", "λ [r, n], γ [n, min], A [r, 1, …], B […, n, r]", found
            )
        return (ANY_SIZE, ANY_SIZE)

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        scales, gamma, a, b = (read_array(parts[name]) for name in self.parts)
        small = scales[:, :, None] * a[:, :, : gamma.shape[1]] * gamma[None]
        large = np.ascontiguousarray(b[:, : len(gamma)]).reshape(len(b), -1)
        scale = np.float32(config["randlora_alpha"] / config["r"])
        return LoadedBases(large, small.reshape(-1, gamma.shape[1]), scale)

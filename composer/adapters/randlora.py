"""RandLoRA: a full-rank sum of scaled random bases that all modules share (arXiv:2502.00987; peft/tuners/randlora).

base_model.randlora_A [r, 1, min]    base_model.randlora_B [max, n, r]    largest sizes; a module takes the first
base_model.model.<module>.randlora_lambda [r, n]    randlora_gamma [n, min(out, in)]

D = B·(λ ⊙ A ⊙ γ), [max(out, in), min(out, in)]     W += alpha / r · D, transposed where out < in
Without save_projection A and B are not in the file, and follow from projection_prng_key and the base's sizes.
PEFT lays B out as [n, r] and the scaled A as [r, n]: the product pairs them as they lie, and so do we.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import Parts, unfit
from composer.adapters._projections import DrawnKind, check_key, randlora_projections
from composer.deltas import BlockDelta, read_array
from composer.product import product

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
class Randlora(DrawnKind):
    """Scaled sums of shared random bases on linear (and Conv1D) weights."""

    name = "randlora"
    peft_types = ("RANDLORA",)
    parts = ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B")
    shared = ("randlora_A", "randlora_B")
    optional = shared
    numbers = ("randlora_alpha",)

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        shapes, rank = {name: spec.shape for name, spec in parts.items()}, config.get("r")
        (scales, gamma), (a, b) = (shapes[name] for name in self.parts[:2]), (shapes.get(name) for name in self.shared)
        fits = len(scales) == len(gamma) == 2 and 0 not in (*scales, *gamma)
        fits = fits and scales[0] == rank and scales[1] == gamma[0]
        if config.get("save_projection") is False and a is None and b is None:
            check_key(config)
        else:
            fits = fits and a is not None and b is not None and len(a) == len(b) == 3 and 0 not in (*a, *b)
            fits = fits and a[0] == b[2] == rank and gamma[0] <= b[1] and a[1] == 1 and gamma[1] <= a[2]
        if not fits:
            found = {name: list(shape) for name, shape in shapes.items()}
            raise damaged(
                f"{module}: the parts of RandLoRA do not fit", "λ [r, n], γ [n, min], A [r, 1, …], B […, n, r]", found
            )
        return (ANY_SIZE, ANY_SIZE)

    def conditions(self, config: dict[str, Any], parts: Parts) -> tuple[str, ...]:
        least = parts["randlora_gamma"].shape[1]
        most = (f"larger <= {parts['randlora_B'].shape[0]}",) if "randlora_B" in parts else ()
        return (f"smaller = {least}", *most)

    def held(self, config: dict[str, Any]) -> int:
        """The bases where they were not saved, as drawn and as laid out for the product: n · r is about min."""
        (least, most), rank = sorted(config["sizes"]), config["r"]
        return 8 * (least + most) * (least + rank) if config.get("save_projection") is False else 0

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        scales, gamma = (read_array(parts[name]) for name in self.parts[:2])
        if self.shared[0] in parts:
            a, b = (read_array(parts[name]) for name in self.shared)
        else:
            sparse = bool(config.get("sparse")), bool(config.get("very_sparse"))
            a, b = randlora_projections(config["r"], config["sizes"], config["projection_prng_key"], *sparse)
        if len(gamma) > b.shape[1] or gamma.shape[1] > a.shape[2]:
            raise unfit("randlora", f"a weight whose smaller size is at least {gamma.shape[1]}", a.shape[2])
        small = scales[:, :, None] * a[:, :, : gamma.shape[1]] * gamma[None]
        large = np.ascontiguousarray(b[:, : len(gamma)]).reshape(len(b), -1)
        scale = np.float32(config["randlora_alpha"] / config["r"])
        return LoadedBases(large, small.reshape(-1, gamma.shape[1]), scale)

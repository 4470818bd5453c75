"""GraLoRA: a LoRA for each of k × k blocks of the weight (arXiv:2505.20355; peft/tuners/gralora/layer.py).

base_model.model.<module>.gralora_A [k, in / k, r]    gralora_B [k, r, out / k]
                          gralora_A_general.weight [h, in]    gralora_B_general.weight [out, h]    with hybrid_r = h

by blocks (j, n): W += s · B[j, n·r/k : (n + 1)·r/k]ᵀ · A[n, :, j·r/k : (j + 1)·r/k]ᵀ     s = alpha / (r + h)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts
from composer.deltas import BlockDelta, read_array
from composer.product import product

__all__ = ["Gralora"]

GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")


@dataclass(frozen=True, slots=True)
class LoadedBlocks:
    """left [k, out / k, k, r / k] and right [k, k, r / k, in / k], both by output block first; float32."""

    left: np.ndarray
    right: np.ndarray
    scale: np.float32
    general: tuple[np.ndarray, np.ndarray] | None

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        count, height, _, _ = self.left.shape
        width = self.right.shape[3]
        delta = np.empty(base.shape, np.float32)
        for j in range(start // height, -(-stop // height)):
            first, last = max(start, j * height), min(stop, (j + 1) * height)
            for n in range(count):
                left = np.ascontiguousarray(self.left[j, first - j * height : last - j * height, n])
                delta[first - start : last - start, n * width : (n + 1) * width] = product(left, self.right[j, n])
        if self.general:
            delta += product(self.general[0][start:stop], self.general[1])
        return delta * self.scale


@adapter_kind
class Gralora(ModuleKind):
    """Low-rank blocks on linear (and Conv1D) weights."""

    name = "gralora"
    peft_types = ("GRALORA",)
    parts = ("gralora_A", "gralora_B", *GENERAL)
    optional = GENERAL
    numbers = ("alpha",)

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        shapes = {name: spec.shape for name, spec in parts.items()}
        a, b, hybrid = shapes["gralora_A"], shapes["gralora_B"], config.get("hybrid_r") or 0
        fits = len(a) == len(b) == 3 and a[0] == b[0] and a[2] == b[1] == config.get("r") and 0 not in (*a, *b)
        out_in = (b[0] * b[2], a[0] * a[1]) if fits else (0, 0)
        general = [shapes.get(name) for name in GENERAL]
        wanted = [(hybrid, out_in[1]), (out_in[0], hybrid)] if hybrid else [None, None]
        if not fits or a[2] % a[0] or general != wanted:
            found = {name: list(shape) for name, shape in shapes.items()}
            raise damaged(f"{module}: the parts of GraLoRA do not fit", "A [k, in / k, r] and B [k, r, out / k]", found)
        return out_in

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        a, b = read_array(parts["gralora_A"]), read_array(parts["gralora_B"])
        count, part = len(a), a.shape[2] // len(a)
        left = b.reshape(count, count, part, -1).transpose(0, 3, 1, 2)
        right = np.ascontiguousarray(a.reshape(count, -1, count, part).transpose(2, 0, 3, 1))
        general = None
        if GENERAL[0] in parts:
            general = (read_array(parts[GENERAL[1]]), read_array(parts[GENERAL[0]]))
        scale = config["alpha"] / (config["r"] + (config.get("hybrid_r") or 0))
        return LoadedBlocks(np.ascontiguousarray(left), right, np.float32(scale), general)

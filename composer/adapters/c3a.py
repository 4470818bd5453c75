"""C3A: blocks of circulant matrices (arXiv:2407.19342; peft/tuners/c3a/layer.py).

base_model.model.<module>.c3a_kernel [out / b, in / b, b]

W[m·b + u, n·b + t] += kernel[m, n, (t − u) mod b] / in
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts
from composer.deltas import BlockDelta, read_array

__all__ = ["C3a"]


@dataclass(frozen=True, slots=True)
class LoadedCirculant:
    """kernel [out / b, in / b, b] / in, float32."""

    kernel: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        size = self.kernel.shape[2]
        numbers = np.arange(start, stop)
        places = (np.arange(size)[None, :] - numbers[:, None]) % size  # [rows, b]
        return np.take_along_axis(self.kernel[numbers // size], places[:, None, :], 2).reshape(base.shape)


@adapter_kind
class C3a(ModuleKind):
    """Circulant blocks on linear weights."""

    name = "c3a"
    peft_types = ("C3A",)
    parts = ("c3a_kernel",)

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        found = parts["c3a_kernel"].shape
        if len(found) != 3 or 0 in found:
            raise damaged(f"{module}: the parts of C3A do not fit", "c3a_kernel [out / b, in / b, b]", list(found))
        return (found[0] * found[2], found[1] * found[2])

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        kernel = read_array(parts["c3a_kernel"])
        return LoadedCirculant(kernel / np.float32(kernel.shape[1] * kernel.shape[2]))

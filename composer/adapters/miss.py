"""MiSS (once Bone): one block of numbers, repeated over the weight (arXiv:2409.15371; peft/tuners/miss/layer.py).

base_model.model.<module>.miss_block [r, out]              W[o, i] += block[i mod r, o]
                          miss_block [r, mini_r]           init_weights="mini": W[o, i] += block[i mod r, o mod mini_r]
                          miss_block [out / r, r, r]       init_weights="bat", by r × r blocks: W += W·B + B
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts, unfit
from composer.deltas import BlockDelta, read_array

__all__ = ["Miss"]


@dataclass(frozen=True, slots=True)
class LoadedRepeated:
    """block [outputs, r], float32, repeated along both sides."""

    block: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        own = self.block[np.arange(start, stop) % len(self.block)]
        return own[:, np.arange(base.shape[1]) % own.shape[1]]


@dataclass(frozen=True, slots=True)
class LoadedBlockAffine:
    """W·B + B by blocks: blocks [out / r, r, r], float32, one for r outputs, for every r inputs alike."""

    blocks: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        rank = self.blocks.shape[1]
        if base.shape[1] % rank:
            raise unfit("miss", f"inputs divisible by {rank}", base.shape[1])
        numbers = np.arange(start, stop)
        own = self.blocks[numbers // rank]  # [rows, r, r]
        grouped = base.reshape(len(base), -1, rank)
        return (grouped @ own + own[np.arange(len(own)), numbers % rank][:, None, :]).reshape(base.shape)


@adapter_kind
class Miss(ModuleKind):
    """Repeated blocks on linear weights."""

    name = "miss"
    peft_types = ("MISS",)
    parts = ("miss_block",)
    options: ClassVar = {"init_weights": (True, False, None, "bat", "mini")}

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        found, rank, init = parts["miss_block"].shape, config.get("r"), config.get("init_weights")
        mini = init == "mini"
        expected = (None, rank, rank) if init == "bat" else (rank, config.get("mini_r") if mini else None)
        fits = len(found) == len(expected) and 0 not in found
        if not fits or any(size not in (own, None) for own, size in zip(found, expected, strict=True)):
            raise damaged(f"{module}: the parts of MiSS do not fit", f"miss_block {expected}", list(found))
        if mini:
            return (ANY_SIZE, ANY_SIZE)
        return (found[0] * found[1] if init == "bat" else found[1], ANY_SIZE)

    def conditions(self, config: dict[str, Any], parts: Parts) -> tuple[str, ...]:
        init = config.get("init_weights")
        if init == "bat":
            return (f"columns multiple of {config['r']}",)
        return (f"rows multiple of {config['mini_r']}",) if init == "mini" else ()

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        block = read_array(parts["miss_block"])
        return LoadedBlockAffine(block) if block.ndim == 3 else LoadedRepeated(np.ascontiguousarray(block.T))

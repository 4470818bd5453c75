"""BD-LoRA: a LoRA one of whose factors is block-diagonal (arXiv:2510.23346; peft/tuners/lora/variants.py).

base_model.model.<module>.lora_A.weight [r, in / n]   lora_B.weight [out, r]   where target_modules_bd_a has the module
base_model.model.<module>.lora_A.weight [r, in]   lora_B.weight [out, r / n]   where target_modules_bd_b has it

A = blockdiag of n pieces [r / n, in / n], or B of n pieces [out / n, r / n]     W += s·B·A, s as in LoRA
A module that neither list has is a plain LoRA. use_bdlora of the config holds both lists and n = nblocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._lora_config import lora_scale
from composer.adapters._lora_parts import A, B, LoraVariant
from composer.adapters._modules import Parts, low_rank
from composer.deltas import BlockDelta, read_array

__all__ = ["Bdlora"]

LISTS = {A: "target_modules_bd_a", B: "target_modules_bd_b"}


@adapter_kind
class Bdlora(LoraVariant):
    """Low-rank deltas with one block-diagonal factor on linear weights."""

    name = "bdlora"
    switches = ("use_bdlora",)
    parts = (A, B)

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        blocks, a, b = _blocks(config, module), parts[A].shape, parts[B].shape
        fits = len(a) == len(b) == 2 and 0 not in (*a, *b)
        if not fits or a[0] != b[1] * blocks[B] or any(parts[name].shape[0] % blocks[name] for name in (A, B)):
            expected = f"A [r, in / {blocks[A]}] and B [out, r / {blocks[B]}]"
            raise damaged(f"{module}: the parts of BD-LoRA do not fit", expected, [list(a), list(b)])
        return (b[0], a[1] * blocks[A])

    def build_module(self, config: dict[str, Any], module: str, parts: Parts) -> BlockDelta:
        blocks = _blocks(config, module)
        a, b = (_whole(read_array(parts[name]), blocks[name]) for name in (A, B))
        return low_rank(b, a, lora_scale(config, module, len(a)))


def _blocks(config: dict[str, Any], module: str) -> dict[str, int]:
    """How many blocks A and B have for a module: a list has it where an entry is part of its name."""
    options = config["use_bdlora"]
    lists = {part: options.get(field) or [] for part, field in LISTS.items()} if isinstance(options, dict) else {}
    count = options.get("nblocks") if lists else None
    if type(count) is not int or count < 1 or not all(isinstance(patterns, list) for patterns in lists.values()):
        raise damaged("adapter_config.json: use_bdlora", "two lists of modules and a number of blocks", options)
    return {
        part: count if any(isinstance(pattern, str) and pattern in module for pattern in patterns) else 1
        for part, patterns in lists.items()
    }


def _whole(factor: np.ndarray, blocks: int) -> np.ndarray:
    """The blocks, which lie one below another, on a diagonal."""
    if blocks == 1:
        return factor
    height, width = len(factor) // blocks, factor.shape[1]
    whole = np.zeros((len(factor), width * blocks), np.float32)
    for index in range(blocks):
        rows = slice(index * height, (index + 1) * height)
        whole[rows, index * width : (index + 1) * width] = factor[rows]
    return whole

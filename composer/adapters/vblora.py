"""VB-LoRA: LoRA whose factors are mixtures of vectors out of one bank (arXiv:2405.15179; peft/tuners/vblora/layer.py).

base_model.vblora_vector_bank [vectors, length]
base_model.model.<module>.vblora_logits_A [r, in / length, vectors]    vblora_logits_B [out / length, r, vectors]

A, B = softmax(the topk largest logits) · their vectors     W += B·A
save_only_topk_weights keeps the places and all but the last of the weights instead of the logits.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts, low_rank
from composer.deltas import BlockDelta, read_array
from composer.tensors import TensorSpec

__all__ = ["Vblora"]

LOGITS = ("vblora_logits_A", "vblora_logits_B")
BANK = "vblora_vector_bank"


@adapter_kind
class Vblora(ModuleKind):
    """Low-rank deltas out of a vector bank on linear (and Conv1D) weights."""

    name = "vblora"
    peft_types = ("VBLORA",)
    shared = (BANK,)
    integers = tuple(f"{name}_topk_indices" for name in LOGITS)
    parts = (*LOGITS, *integers, *(f"{name}_topk_weights" for name in LOGITS))
    optional = parts
    options: ClassVar = {"save_only_topk_weights": (False, True)}

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        bank, shapes = parts[BANK].shape, {name: list(spec.shape) for name, spec in parts.items()}
        a, b = (self._mixture(config, parts, name) for name in LOGITS)
        if len(bank) != 2 or 0 in bank or a is None or b is None or a[0] != b[1] or a[0] != config.get("r"):
            raise damaged(
                f"{module}: the parts of VB-LoRA do not fit", "logits of A [r, …] and B […, r], a bank", shapes
            )
        return (b[0] * bank[1], a[1] * bank[1])

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        bank = read_array(parts[BANK])
        a, b = (self._mixed(config, parts, name, bank) for name in LOGITS)
        return low_rank(b.swapaxes(1, 2).reshape(-1, b.shape[1]), a.reshape(len(a), -1))

    def _mixture(self, config: dict[str, Any], parts: Parts, name: str) -> tuple[int, ...] | None:
        """The first two sizes of the mixture; None where its tensors are not what the config says."""
        topk, vectors = config.get("topk"), parts[BANK].shape[0] if parts[BANK].shape else 0
        if type(topk) is not int or not 0 < topk <= vectors:
            return None
        given: dict[str, TensorSpec] = {part: spec for part, spec in parts.items() if part.startswith(name)}
        last = {name: vectors}
        if config.get("save_only_topk_weights"):
            last = {f"{name}_topk_indices": topk, f"{name}_topk_weights": topk - 1}
        if set(given) != set(last) or any(len(spec.shape) != 3 for spec in given.values()):
            return None
        sizes = {spec.shape[:2] for spec in given.values()}
        fits = all(spec.shape[2] == last[part] for part, spec in given.items()) and len(sizes) == 1
        return sizes.pop() if fits else None

    def _mixed(self, config: dict[str, Any], parts: Parts, name: str, bank: np.ndarray) -> np.ndarray:
        """[…, …, length]: the weighted sum of the topk vectors."""
        if config.get("save_only_topk_weights"):
            places = parts[f"{name}_topk_indices"].read().astype(np.int64)
            weights = read_array(parts[f"{name}_topk_weights"])
            weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True, dtype=np.float32)], axis=-1)
            if places.min() < 0 or places.max() >= len(bank):
                found = [int(places.min()), int(places.max())]
                raise damaged(f"{name}: places outside the vector bank", f"0 to {len(bank) - 1}", found)
        else:
            logits = read_array(parts[name])
            places = np.argsort(-logits, axis=-1, kind="stable")[..., : config["topk"]]
            chosen = np.take_along_axis(logits, places, -1)
            weights = np.exp(chosen - chosen.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
        return (weights[..., None] * bank[places]).sum(-2)

"""LoRA on the stacked weights of a mixture's experts: a pair of factors an expert, all in two matrices.

A [E·r, x], expert by expert     B [y, r·E], the expert running fastest     Δ[e] = s·B_e·A_e  [y, x], or its transpose

Which of the two a module keeps depends on the architecture and on the version of PEFT: before 0.19 A has the first of
a parameter's inner dimensions, since then the last, unless the module says that it keeps [in, out]. Where the two
differ in size, the base shows it.
Source: PEFT's tuners/lora/layer.py, ParamWrapper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from composer.deltas import Delta, LoadedLowRank, read_array
from composer.errors import IncompatibleError
from composer.experts import ExpertStack
from composer.product import product
from composer.tensors import TensorSpec

__all__ = ["ExpertLowRank", "ExpertSlice", "LoadedExperts"]

# Architectures that store all experts in one tensor: whether, for PEFT since 0.19, A has the first inner dimension of
# what is stored. Modules of gpt-oss and Aria say that they keep [in, out]; Qwen3-VL's are turned when they are loaded.
FIRST_DIMENSION = {
    "gpt_oss": True,
    "openai_privacy_filter": True,
    "aria_text": True,
    "qwen3_vl_moe_text": True,
    "llama4_text": False,
    "granitemoe": False,
    "granitemoeshared": False,
    "granitemoehybrid": False,
}
TURNED_SINCE_5 = ("qwen3_vl_moe_text",)  # not in transformers 4, and PEFT 0.18 goes with both
# Factors of the experts that are being merged; each array lives as long as some expert's part of it.
LOADED: WeakValueDictionary[tuple[Any, ...], np.ndarray] = WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class ExpertLowRank:
    """Δ[e] for every expert of the parameter `target` [experts, d1, d2].

    recent: saved by PEFT 0.19 or later. turned: A has d1, so that Δ[e] = (B_e·A_e)ᵀ; known once `placed` on a base.
    """

    target: str
    a: TensorSpec
    b: TensorSpec
    experts: int
    scale: float
    recent: bool
    turned: bool = False
    stacked: bool = True
    replaces: bool = False
    whole: bool = False

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (self.a, self.b)

    def placed(self, shape: tuple[int, ...], stack: ExpertStack | None, config: Mapping[str, Any]) -> list[Delta]:
        """The same for a base: of the stored parameter [experts, d1, d2], or of each expert's own matrices in `stack`.

        config: config.json of the base. Raises IncompatibleError where d1 and d2 are equal and nothing else tells
        whether A has the first or the last.
        """
        first = self._first_dimension(shape, stack, config)
        placed = replace(self, turned=first)
        if stack is None:
            return [placed]
        return [
            ExpertSlice(name, placed, expert, sum(stack.rows[:part]), sum(stack.rows[: part + 1]))
            for expert, names in enumerate(stack.names)
            for part, name in enumerate(names)
        ]

    def _first_dimension(self, shape: tuple[int, ...], stack: ExpertStack | None, config: Mapping[str, Any]) -> bool:
        if shape[1] != shape[2]:
            return shape[1:] != (self.b.shape[0], self.a.shape[1])
        text = config.get("text_config")
        model = (text if isinstance(text, dict) else config).get("model_type")
        # Matrices of single experts are [out, in], as modules are that PEFT does not call transposed
        known = False if stack else FIRST_DIMENSION.get(str(model))
        if known is None or (model in TURNED_SINCE_5 and not self.recent):
            raise IncompatibleError(
                f"{self.target}: the experts' weights are square, and whether A has their first dimension or their "
                f"last is not known for {model!r}",
                expected=sorted(FIRST_DIMENSION),
                found=model,
                remedy="merge it with the version of PEFT that trained it",
            )
        return known or not self.recent

    @property
    def loaded_bytes(self) -> int:
        """Held while it is merged; as much again while a factor is read and brought into order."""
        return 2 * sum(4 * math.prod(source.shape) for source in self.sources)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """left [experts, d1, r] and right [experts, r, d2], float32, C-contiguous."""
        return self._factor("left"), self._factor("right")

    def _factor(self, side: str) -> np.ndarray:
        key = (self.a.path, self.a.name, self.turned, side)
        loaded = LOADED.get(key)
        if loaded is None:
            if self.turned == (side == "left"):
                array = read_array(self.a).reshape(self.experts, -1, self.a.shape[1])
                order = (0, 2, 1) if side == "left" else (0, 1, 2)
            else:
                array = read_array(self.b).reshape(self.b.shape[0], -1, self.experts)
                order = (2, 0, 1) if side == "left" else (2, 1, 0)
            # A copy of its own: a view of it keeps it in LOADED, and it goes with the last one.
            loaded = LOADED[key] = np.array(array.transpose(order), order="C")
        return loaded

    def load(self) -> LoadedExperts:
        return LoadedExperts(*self.factors(), np.float32(self.scale))


@dataclass(frozen=True, slots=True)
class LoadedExperts:
    """All experts' factors in memory: left [experts, d1, r], right [experts, r, d2], float32."""

    left: np.ndarray
    right: np.ndarray
    scale: np.float32

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """Rows of [experts, d1·d2], or of [experts·d1, d2] where `base` has rows of d2 numbers."""
        height, width = self.left.shape[1], self.right.shape[2]
        if base.shape[1] == width:
            first, last = start, stop
        else:
            first, last = start * height, stop * height
        out = np.empty((last - first, width), np.float32)
        for expert in range(first // height, -(-last // height)):
            top = expert * height
            above, below = max(first, top), min(last, top + height)
            part = product(self.left[expert, above - top : below - top], self.right[expert])
            out[above - first : below - first] = part * self.scale
        return out.reshape(base.shape)


@dataclass(frozen=True, slots=True)
class ExpertSlice:
    """One expert's rows [first, last) of Δ[e], where the checkpoint stores them as a matrix of their own."""

    target: str
    parent: ExpertLowRank
    expert: int
    first: int
    last: int
    replaces: bool = False
    whole: bool = False

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return self.parent.sources

    @property
    def loaded_bytes(self) -> int:
        """All experts' factors: the array that the slice is a view of."""
        return self.parent.loaded_bytes

    def load(self) -> LoadedLowRank:
        left, right = self.parent.factors()
        return LoadedLowRank(
            left[self.expert, self.first : self.last], right[self.expert], np.float32(self.parent.scale)
        )

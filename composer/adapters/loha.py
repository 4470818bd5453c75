"""LoHa: the Hadamard product of two low-rank products (arXiv:2108.06098; peft/tuners/loha/layer.py).

base_model.model.<module>.hada_w1_a [out, r]  hada_w1_b [r, in]      W += s·(w1_a·w1_b) ⊙ (w2_a·w2_b)
base_model.model.<module>.hada_w2_a [out, r]  hada_w2_b [r, in]      s = alpha / r
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from composer.adapters import Signature, Target, adapter_kind, parameter_count, refuse
from composer.adapters._alpha import check_alpha, scale_of
from composer.adapters._common import check_floats, damaged, factors_by_module, module_names, whole_tensors
from composer.deltas import Delta, Replace, read_array
from composer.product import product
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = ["Loha"]

PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CONVOLUTION = ("hada_t1", "hada_t2")


@dataclass(frozen=True, slots=True)
class Hadamard:
    """scale · (a₁·b₁) ⊙ (a₂·b₂); `sources` are a₁ [out, r], b₁ [r, in], a₂, b₂."""

    target: str
    sources: tuple[TensorSpec, ...]
    scale: float
    replaces: bool = False
    whole: bool = False
    transposed: bool = False

    def load(self) -> LoadedHadamard:
        return LoadedHadamard(*map(read_array, self.sources), np.float32(self.scale))


@dataclass(frozen=True, slots=True)
class LoadedHadamard:
    """The four factors in memory, float32."""

    a1: np.ndarray
    b1: np.ndarray
    a2: np.ndarray
    b2: np.ndarray
    scale: np.float32

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        return product(self.a1[start:stop], self.b1) * product(self.a2[start:stop], self.b2) * self.scale


@adapter_kind
class Loha:
    """Hadamard products on linear weights."""

    name = "loha"
    peft_types = ("LOHA",)
    refuses: ClassVar = {"convolutions": "not read yet"}

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise UnsupportedAdapterError for convolutions, CorruptFileError for factors that do not fit one another."""
        check_floats(header)
        check_alpha(config)
        for module, parts in factors_by_module(header, PARTS + CONVOLUTION).items():
            shapes = {name: spec.shape for name, spec in parts.items()}
            if set(CONVOLUTION) & set(shapes) or any(len(shape) != 2 for shape in shapes.values()):
                raise refuse(
                    f"{module}: LoHa on a convolution is not supported yet",
                    expected="matrices",
                    found={name: list(shape) for name, shape in shapes.items()},
                    remedy="merge it with PEFT",
                )
            rank = scale_of(config, module)[1]
            fits = set(shapes) == set(PARTS) and all(
                shapes[f"hada_w{index}_a"] == (shapes["hada_w1_a"][0], rank)
                and shapes[f"hada_w{index}_b"] == (rank, shapes["hada_w1_b"][1])
                for index in (1, 2)
            )
            if not fits:
                expected = f"a [out, {rank}] and b [{rank}, in], twice"
                raise damaged(f"{module}: the factors of LoHa do not fit one another", expected, str(shapes))

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """[out, in] for each module, the own shape of each whole tensor."""
        factors = factors_by_module(header, PARTS)
        targets = [
            Target(f"{module}.weight", (parts["hada_w1_a"].shape[0], parts["hada_w1_b"].shape[1]))
            for module, parts in factors.items()
        ]
        targets += [Target(parameter, spec.shape) for parameter, spec in whole_tensors(header, factors).items()]
        return Signature(
            kind=self.name,
            targets=tuple(targets),
            parameters=parameter_count(header),
            rank=config["r"],
            alpha=config["alpha"],
            target_modules=module_names(factors),
        )

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """One Hadamard a module, one Replace a whole tensor."""
        factors = factors_by_module(header, PARTS)
        deltas: list[Delta] = [
            Hadamard(names[f"{module}.weight"], tuple(parts[part] for part in PARTS), scale_of(config, module)[0])
            for module, parts in factors.items()
        ]
        return deltas + [Replace(names[parameter], spec) for parameter, spec in whole_tensors(header, factors).items()]

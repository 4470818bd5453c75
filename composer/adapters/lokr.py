"""LoKr: a Kronecker product, either side of it whole or low-rank (arXiv:2309.14859; peft/tuners/lokr/layer.py).

base_model.model.<module>.lokr_w1 [o1, i1]   or  lokr_w1_a [o1, r], lokr_w1_b [r, i1]      W += s·kron(w1, w2)
base_model.model.<module>.lokr_w2 [o2, i2]   or  lokr_w2_a [o2, r], lokr_w2_b [r, i2]      s = alpha / r
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

__all__ = ["Lokr"]

PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
CONVOLUTION = "lokr_t2"

Side = tuple[TensorSpec, ...]  # one whole matrix, or two factors of it


@dataclass(frozen=True, slots=True)
class Kronecker:
    """scale · kron(left, right)."""

    target: str
    left: Side
    right: Side
    scale: float
    replaces: bool = False
    whole: bool = False
    transposed: bool = False

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return self.left + self.right

    def load(self) -> LoadedKronecker:
        return LoadedKronecker(_matrix(self.left), _matrix(self.right), np.float32(self.scale))


@dataclass(frozen=True, slots=True)
class LoadedKronecker:
    """left [o1, i1] and right [o2, i2] in memory, float32."""

    left: np.ndarray
    right: np.ndarray
    scale: np.float32

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        height = len(self.right)
        first, last = start // height, -(-stop // height)
        return np.kron(self.left[first:last], self.right)[start - first * height : stop - first * height] * self.scale


@adapter_kind
class Lokr:
    """Kronecker products on linear weights."""

    name = "lokr"
    peft_types = ("LOKR",)
    refuses: ClassVar = {"convolutions": "not read yet"}

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise UnsupportedAdapterError for convolutions, CorruptFileError for factors that do not fit one another."""
        check_floats(header)
        check_alpha(config)
        for module, parts in factors_by_module(header, (*PARTS, CONVOLUTION)).items():
            shapes = {name: list(spec.shape) for name, spec in parts.items()}
            if CONVOLUTION in parts or any(len(shape) != 2 for shape in shapes.values()):
                raise refuse(
                    f"{module}: LoKr on a convolution is not supported yet",
                    expected="matrices",
                    found=shapes,
                    remedy="merge it with PEFT",
                )
            rank = scale_of(config, module)[1]
            if not (_fits(parts, "lokr_w1", rank) and _fits(parts, "lokr_w2", rank)):
                expected = f"lokr_w1 and lokr_w2, each whole or as a [.., {rank}] and b [{rank}, ..]"
                raise damaged(f"{module}: the factors of LoKr do not fit one another", expected, shapes)

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """[o1·o2, i1·i2] for each module, the own shape of each whole tensor."""
        factors = factors_by_module(header, PARTS)
        targets = []
        for module, parts in factors.items():
            left, right = _side(parts, "lokr_w1"), _side(parts, "lokr_w2")
            shape = (left[0].shape[0] * right[0].shape[0], left[-1].shape[1] * right[-1].shape[1])
            targets.append(Target(f"{module}.weight", shape))
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
        """One Kronecker a module, one Replace a whole tensor."""
        factors = factors_by_module(header, PARTS)
        deltas: list[Delta] = [
            Kronecker(
                names[f"{module}.weight"],
                _side(parts, "lokr_w1"),
                _side(parts, "lokr_w2"),
                scale_of(config, module)[0],
            )
            for module, parts in factors.items()
        ]
        return deltas + [Replace(names[parameter], spec) for parameter, spec in whole_tensors(header, factors).items()]


def _side(parts: Mapping[str, TensorSpec], name: str) -> Side:
    return (parts[name],) if name in parts else (parts[f"{name}_a"], parts[f"{name}_b"])


def _fits(parts: Mapping[str, TensorSpec], name: str, rank: int) -> bool:
    """Whether this side is there once, and its factors have the configured rank."""
    given = {part for part in parts if part.startswith(name)}
    if given == {name}:
        return True
    return given == {f"{name}_a", f"{name}_b"} and (parts[f"{name}_a"].shape[1] == rank == parts[f"{name}_b"].shape[0])


def _matrix(side: Side) -> np.ndarray:
    arrays = [read_array(spec) for spec in side]
    return arrays[0] if len(arrays) == 1 else product(*arrays)

"""GLoRA: scales, shifts and a prompt for weight and bias (arXiv:2306.07967; peft/tuners/glora/layer.py).

base_model.model.<module>.glora_A, glora_B     each .Xd [out, r] and .Xu [r, in] ("lora"), .X [out, 1] ("vector"),
                                               .X [1] ("constant") or .zeros [out, in] ("none")
                          glora_C              .Xd [in, r] and .Xu [r, 1], .X [in, 1] or .zeros [in, 1]
                          glora_D, glora_E     .X [out], .X [1] or .zeros [out]

W' = W + W ⊙ A + B     b' = b + b ⊙ D + E + W·C     with W and b of the base
C, D and E are zeros where the module had no bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from composer.adapters import ANY_SIZE, BaseTensor, Signature, Target, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import Computed, ModuleKind, Parts
from composer.deltas import BlockDelta, Delta, read_array
from composer.product import product
from composer.tensors import DTYPES, SafetensorsHeader

__all__ = ["Glora"]

PATHS = ("A", "B", "C", "D", "E")
FORMS = ("Xd", "Xu", "X", "zeros")
CHUNK = 4 << 20  # bytes of the weight that are read at once for W·C


@dataclass(frozen=True, slots=True)
class Path:
    """One of A to E in memory: left·right [rows, columns], or a vector or number that numpy spreads. Float32."""

    left: np.ndarray
    right: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> np.ndarray:
        if self.right is not None:
            return product(self.left[start:stop], self.right)
        return self.left if self.left.size == 1 else self.left[start:stop]


@dataclass(frozen=True, slots=True)
class LoadedAffine:
    """x ⊙ scale + shift + more, of the base's own rows."""

    scale: Path
    shift: Path
    more: np.ndarray | None = None

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        change = base * _column(self.scale.rows(start, stop)) + _column(self.shift.rows(start, stop))
        return change if self.more is None else change + _column(self.more[start:stop])


@adapter_kind
class Glora(ModuleKind):
    """Affine changes of linear weights and of their biases."""

    name = "glora"
    peft_types = ("GLORA",)
    parts = tuple(f"glora_{path}.{form}" for path in PATHS for form in FORMS)
    optional = parts

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        """[out, in] as far as A and B say it, after a check that all paths agree."""
        sizes = {path: _size(parts, path) for path in PATHS}
        known = {path: size for path, size in sizes.items() if size is not None}
        outputs = {rows for path, (rows, _) in known.items() if path != "C"} - {ANY_SIZE}
        inputs = {known[path][side] for path, side in (("A", 1), ("B", 1), ("C", 0)) if path in known} - {ANY_SIZE}
        columns = all(known[path][1] == 1 for path in "CDE" if path in known)
        if len(known) < len(PATHS) or len(outputs) > 1 or len(inputs) > 1 or not columns:
            found = {name: list(spec.shape) for name, spec in parts.items()}
            raise damaged(f"{module}: the parts of GLoRA do not fit", "A to E for one weight [out, in]", found)
        return (*(outputs or {ANY_SIZE}), *(inputs or {ANY_SIZE}))

    def signature(self, config: dict[str, Any], header: SafetensorsHeader) -> Signature:
        """As every kind, and the bias where C, D or E change it."""
        plain = super().signature(config, header)
        biases = []
        for module, parts in self._modules(header).items():
            if _changes_bias(parts):
                biases.append(Target(f"{module}.bias", self.shape(config, module, parts)[:1]))
        return Signature(
            kind=plain.kind,
            targets=(*plain.targets, *biases),
            parameters=plain.parameters,
            rank=plain.rank,
            target_modules=plain.target_modules,
        )

    def deltas_on(
        self,
        config: dict[str, Any],
        header: SafetensorsHeader,
        names: Mapping[str, str],
        base: Mapping[str, BaseTensor],
    ) -> list[Delta]:
        """One Computed a weight and one a bias; that of a bias reads the base's own W where there is a C."""
        deltas = self.deltas(config, header, names)
        for module, parts in self._modules(header).items():
            if _changes_bias(parts):
                build = partial(_load_bias, parts, base[f"{module}.weight"])
                deltas.append(Computed(names[f"{module}.bias"], tuple(parts.values()), build))
        return deltas

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        return LoadedAffine(_load(parts, "A"), _load(parts, "B"))


def _size(parts: Parts, path: str) -> tuple[int, int] | None:
    """(rows, columns) of a path, ANY_SIZE where any size goes; None where its tensors are not one of the forms."""
    given = {form: parts[f"glora_{path}.{form}"].shape for form in FORMS if f"glora_{path}.{form}" in parts}
    if set(given) == {"Xd", "Xu"}:
        left, right = given["Xd"], given["Xu"]
        fits = len(left) == len(right) == 2 and left[1] == right[0] and 0 not in (*left, *right)
        return (left[0], right[1]) if fits else None
    if len(given) != 1 or set(given) & {"Xd", "Xu"}:
        return None
    shape = next(iter(given.values()))
    if 0 in shape or len(shape) not in ((1,) if path in "DE" else (1, 2)):
        return None
    if shape == (1,):
        return (ANY_SIZE, ANY_SIZE if path in "AB" else 1)
    if "X" in given:
        vector = len(shape) == 1 if path in "DE" else len(shape) == 2 and shape[1] == 1
        return (shape[0], ANY_SIZE if path in "AB" else 1) if vector else None
    return (shape[0], shape[1] if len(shape) == 2 else 1)


def _load(parts: Parts, path: str) -> Path:
    if f"glora_{path}.Xd" in parts:
        return Path(read_array(parts[f"glora_{path}.Xd"]), read_array(parts[f"glora_{path}.Xu"]))
    if f"glora_{path}.X" in parts:
        return Path(read_array(parts[f"glora_{path}.X"]))
    return Path(np.zeros(1, np.float32))


def _load_bias(parts: Parts, weight: BaseTensor) -> BlockDelta:
    more = None
    if "glora_C.zeros" not in parts:
        path = _load(parts, "C")
        prompt = path.left if path.right is None else product(path.left, path.right)
        more = _times(weight, prompt.ravel())
    return LoadedAffine(_load(parts, "D"), _load(parts, "E"), more)


def _times(weight: BaseTensor, vector: np.ndarray) -> np.ndarray:
    """W·vector in float64, as float32 [out], reading the base's W a few rows at a time."""
    rows, columns = weight.shape
    width = columns * DTYPES[weight.dtype].itemsize
    step = max(1, CHUNK // width)
    pieces = []
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        block = np.frombuffer(weight.read_bytes(start * width, stop * width), DTYPES[weight.dtype])
        pieces.append(block.reshape(stop - start, columns).astype(np.float64) @ vector)
    return np.concatenate(pieces).astype(np.float32)


def _column(values: np.ndarray) -> np.ndarray:
    """A vector [rows] as [rows, 1]."""
    return values[:, None] if values.ndim == 1 else values


def _changes_bias(parts: Parts) -> bool:
    return any(f"glora_{path}.zeros" not in parts for path in "CDE")

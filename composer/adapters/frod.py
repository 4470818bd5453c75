"""FRoD: the weight in a basis that its layer shares with all others, trained there (peft/tuners/frod/layer.py).

base_model.frod_V.<category> [in, in]   frod_s_indices.<category> [2, n] int64   frod_s_size.<category> [2] int64
base_model.model.<module>.frod_lambda_l [in]   frod_lambda_s_values [n]

U·diag(l)·Vᵀ = W with the columns of U of norm 1: U is computed from the base's W and V
W' = U·(diag(frod_lambda_l) + S)·Vᵀ     S is zero but for the values at the indices
A category is the role of a module: the last two parts of its name, or the last one after a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import SHARED_PREFIX, ModuleKind, Parts, unfit
from composer.deltas import BlockDelta, read_array
from composer.errors import NonFiniteError
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = ["Frod"]

TABLES = ("frod_V", "frod_s_indices", "frod_s_size")
NOTHING = 1e-12  # a column of U whose norm is not above this stays zero, as in PEFT


@dataclass(frozen=True, slots=True)
class LoadedBasis:
    """V [in, in] and the trained middle diag(l) + S [in, in], float32."""

    basis: np.ndarray
    middle: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """All rows: the norms of U's columns need them. U is computed in float64."""
        if base.shape[1] != len(self.basis):
            raise unfit("frod", f"{len(self.basis)} inputs", base.shape[1])
        basis = self.basis.astype(np.float64)
        try:
            unscaled = np.linalg.solve(basis, base.T.astype(np.float64)).T
        except np.linalg.LinAlgError:
            raise NonFiniteError(
                "frod_V has no inverse, so the weight has no place in its basis",
                expected="a basis of the inputs",
                found="a singular matrix",
                remedy="save the adapter again with PEFT",
                tensor="frod_V",
            ) from None
        norm = np.linalg.norm(unscaled, axis=0)
        unit = np.where(norm > NOTHING, unscaled / np.maximum(norm, NOTHING), 0).astype(np.float32)
        return unit @ self.middle @ self.basis.T - base


@adapter_kind
class Frod(ModuleKind):
    """Linear (and Conv1D) weights trained in a shared basis."""

    name = "frod"
    peft_types = ("FROD",)
    parts = ("frod_lambda_l", "frod_lambda_s_values", *TABLES)
    integers = TABLES[1:]
    mixes_rows = True
    scratch = 32
    saved: ClassVar = {"save_projection": "eigenvectors differ between linear-algebra libraries"}

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        shapes = {name: spec.shape for name, spec in parts.items()}
        scales, values, basis, places, size = (shapes[name] for name in self.parts)
        fits = len(scales) == len(values) == 1 and scales[0] and basis == (scales[0], scales[0])
        integers = all(parts[name].dtype[0] == "I" for name in self.integers)
        if not fits or not integers or places != (2, *values) or size != (2,):
            found = {name: list(shape) for name, shape in shapes.items()}
            expected = "lambda_l [in], s_values [n], V [in, in], s_indices [2, n]"
            raise damaged(f"{module}: the parts of FRoD do not fit", expected, found)
        return (ANY_SIZE, scales[0])

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        middle = np.diag(read_array(parts["frod_lambda_l"]))
        row, column = parts["frod_s_indices"].read().astype(np.int64)
        if len(row) and (min(row.min(), column.min()) < 0 or max(row.max(), column.max()) >= len(middle)):
            found = [int(min(row.min(), column.min())), int(max(row.max(), column.max()))]
            raise damaged("frod_s_indices: places outside the matrix", f"0 to {len(middle) - 1}", found)
        np.add.at(middle, (row, column), read_array(parts["frod_lambda_s_values"]))
        return LoadedBasis(read_array(parts["frod_V"]), middle)

    def _modules(self, header: SafetensorsHeader) -> dict[str, dict[str, TensorSpec]]:
        shared = self._shared(header)
        found = {}
        for module, parts in self._own(header).items():
            tables = {name: shared.get(f"{name}.{_category(module)}") for name in TABLES}
            found[module] = {**{name: spec for name, spec in tables.items() if spec is not None}, **parts}
        return found

    def _shared(self, header: SafetensorsHeader) -> dict[str, TensorSpec]:
        prefixes = tuple(f"{SHARED_PREFIX}{name}." for name in TABLES)
        found = {name: spec for name, spec in header.tensors.items() if name.startswith(prefixes)}
        return {name.removeprefix(SHARED_PREFIX).removesuffix(".default"): spec for name, spec in found.items()}


def _category(module: str) -> str:
    """The role of a module, as PEFT names it."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"

"""SHiRA: changes to a few numbers of the weight (arXiv:2406.13175; peft/tuners/shira/layer.py).

base_model.model.<module>.shira_weight [n]    shira_indices [2, n] int32, the row and the column of each

W[row, column] += weight
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts, unfit
from composer.deltas import BlockDelta, read_array

__all__ = ["Shira"]


@dataclass(frozen=True, slots=True)
class LoadedSparse:
    """Values [n], float32, at rows [n] and columns [n]; those at the same place are added."""

    row: np.ndarray
    column: np.ndarray
    values: np.ndarray
    rank: int

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        # n = r · (out + in) says how many rows there must be: none of the changes may fall beside the base
        outputs = len(self.values) // self.rank - base.shape[1]
        if stop != outputs or self.column.max() >= base.shape[1] or self.row.max() >= outputs:
            raise unfit("shira", f"{outputs} outputs, more than {self.column.max()} inputs", [stop, base.shape[1]])
        delta = np.zeros(base.shape, np.float32)
        here = (self.row >= start) & (self.row < stop)
        np.add.at(delta, (self.row[here] - start, self.column[here]), self.values[here])
        return delta


@adapter_kind
class Shira(ModuleKind):
    """Sparse changes to linear weights."""

    name = "shira"
    peft_types = ("SHIRA",)
    parts = ("shira_weight", "shira_indices")
    integers = ("shira_indices",)
    mixes_rows = True  # only all rows at once show whether the base has as many as the adapter needs

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        values, places = parts["shira_weight"], parts["shira_indices"]
        if (
            len(values.shape) != 1
            or not values.shape[0]
            or places.shape != (2, *values.shape)
            or places.dtype[0] != "I"
        ):
            found = [list(values.shape), list(places.shape), places.dtype]
            raise damaged(f"{module}: the parts of SHiRA do not fit", "weight [n] and integer indices [2, n]", found)
        return (ANY_SIZE, ANY_SIZE)

    def conditions(self, config: dict[str, Any], parts: Parts) -> tuple[str, ...]:
        count, rank = parts["shira_weight"].shape[0], config.get("r")
        return (f"sum = {count // rank}",) if type(rank) is int and rank > 0 else ()

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        row, column = parts["shira_indices"].read().astype(np.int64)
        if min(row.min(), column.min()) < 0:
            raise damaged("shira_indices holds negative places", "0 and more", int(min(row.min(), column.min())))
        return LoadedSparse(row, column, read_array(parts["shira_weight"]), config["r"])

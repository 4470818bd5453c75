"""Super-Tuning: changes to a few numbers of the weight, and a LoRA beside them (arXiv:2607.09287; peft/tuners).

base_model.model.<module>.supertuning_values [n]    supertuning_indices [n] int32, places in the flat weight
                          supertuning_lora_A.weight [r, in], supertuning_lora_B.weight [out, r] where r is set

W.flat[indices] += values     W += lora_alpha / r · B·A
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts, check_number, low_rank, unfit
from composer.deltas import BlockDelta, LoadedLowRank, read_array

__all__ = ["Supertuning"]

FACTORS = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")


@dataclass(frozen=True, slots=True)
class LoadedSupport:
    """Values [n], float32, at places [n] of the flat weight; those at the same place are added."""

    places: np.ndarray
    values: np.ndarray
    low_rank: LoadedLowRank | None

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """All rows: only these show whether every place lies in the weight."""
        if self.places.max() >= base.size:
            raise unfit("supertuning", f"more than {self.places.max()} numbers", list(base.shape))
        delta = np.zeros(base.size, np.float32)
        np.add.at(delta, self.places, self.values)
        delta = delta.reshape(base.shape)
        return delta if self.low_rank is None else delta + self.low_rank.rows(start, stop, base)


@adapter_kind
class Supertuning(ModuleKind):
    """Sparse changes to linear weights, with or without a low-rank one."""

    name = "supertuning"
    peft_types = ("SUPERTUNING",)
    parts = ("supertuning_values", "supertuning_indices", *FACTORS)
    optional = FACTORS
    integers = ("supertuning_indices",)
    mixes_rows = True
    saved: ClassVar = {"save_precomputed_indices": "equal numbers of the base may be ranked in any order"}

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        shapes, rank = {name: spec.shape for name, spec in parts.items()}, config.get("r")
        values, places = shapes["supertuning_values"], shapes["supertuning_indices"]
        fits = len(values) == 1 and values[0] and places == values
        fits = fits and parts["supertuning_indices"].dtype[0] == "I"
        a, b = (shapes.get(name) for name in FACTORS)
        if rank is None:
            fits = fits and a is None and b is None
        else:
            check_number(config, "lora_alpha")
            fits = fits and a is not None and b is not None and len(a) == len(b) == 2
            fits = fits and a[0] == b[1] == rank and 0 not in (*a, *b)
        if not fits:
            found = {name: list(shape) for name, shape in shapes.items()}
            expected = "values [n], integer indices [n] and, where r is set, A [r, in] and B [out, r]"
            raise damaged(f"{module}: the parts of Super-Tuning do not fit", expected, found)
        return (ANY_SIZE, ANY_SIZE) if a is None or b is None else (b[0], a[1])

    def conditions(self, config: dict[str, Any], parts: Parts) -> tuple[str, ...]:
        return (f"product >= {parts['supertuning_values'].shape[0]}",)

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        places = parts["supertuning_indices"].read().astype(np.int64)
        if places.min() < 0:
            raise damaged("supertuning_indices holds negative places", "0 and more", int(places.min()))
        factors = None
        if FACTORS[0] in parts:
            a, b = (read_array(parts[name]) for name in FACTORS)
            factors = low_rank(b, a, config["lora_alpha"] / config["r"])
        return LoadedSupport(places, read_array(parts["supertuning_values"]), factors)

"""VeRA and PVeRA: two random projections that all modules share, scaled by vectors (arXiv:2310.11454; PEFT's vera).

base_model.vera_A [r, largest in]    base_model.vera_B [largest out, r]
base_model.model.<module>.vera_lambda_b [out]    vera_lambda_d [r]

W += (λb ⊙ B[:out])·(λd ⊙ A[:, :in])
Without save_projection A and B are not in the file, and follow from projection_prng_key and the base's sizes.
PVeRA (peft/tuners/pvera) keeps 2r rows of A and λd, means first: the mean is what a merge can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import Parts, unfit
from composer.adapters._projections import DrawnKind, check_key, vera_projections
from composer.deltas import BlockDelta, read_array
from composer.product import product

__all__ = ["Pvera", "Vera"]


@dataclass(frozen=True, slots=True)
class LoadedProjections:
    """left [out, r] · right [r, largest in], as many columns as the base has; float32."""

    kind: str
    left: np.ndarray
    right: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        if base.shape[1] > self.right.shape[1]:
            raise unfit(self.kind, f"at most {self.right.shape[1]} inputs", base.shape[1])
        return product(self.left[start:stop], np.ascontiguousarray(self.right[:, : base.shape[1]]))


@adapter_kind
class Vera(DrawnKind):
    """Scaled slices of shared random projections on linear (and Conv1D) weights."""

    name = "vera"
    peft_types = ("VERA",)
    parts = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")
    optional = shared
    halves = 1  # of A and λd, of which the first counts

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        shapes = {name: spec.shape for name, spec in parts.items()}
        (b, d), (a, bb) = (shapes[name] for name in self.parts), (shapes.get(name) for name in self.shared)
        fits = len(b) == len(d) == 1 and 0 not in (*b, *d) and d[0] % self.halves == 0
        if config.get("save_projection") is False and a is None and bb is None:
            check_key(config)
            rank = config.get("r")
            fits = fits and type(rank) is int and d[0] == self.halves * rank
        else:
            fits = fits and a is not None and bb is not None and len(a) == len(bb) == 2 and 0 not in (*a, *bb)
            fits = fits and d[0] == a[0] == self.halves * bb[1] and b[0] <= bb[0]
        if not fits:
            found = {name: list(shape) for name, shape in shapes.items()}
            raise damaged(
                f"{module}: the parts of {self.name} do not fit", "λb [out], λd [r], A [r, …], B […, r]", found
            )
        return (b[0], ANY_SIZE)

    def conditions(self, config: dict[str, Any], parts: Parts) -> tuple[str, ...]:
        return (f"columns <= {parts[self.shared[0]].shape[1]}",) if self.shared[0] in parts else ()

    def held(self, config: dict[str, Any]) -> int:
        """The projections where they were not saved, as drawn and as scaled."""
        drawn = config.get("save_projection") is False
        return 8 * config["r"] * (self.halves * config["sizes"][1] + config["sizes"][0]) if drawn else 0

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        b, d = (read_array(parts[name]) for name in self.parts)
        rank = len(d) // self.halves
        if self.shared[0] in parts:
            a, bb = (read_array(parts[name]) for name in self.shared)
        else:
            a, bb = vera_projections(rank, self.halves, config["sizes"], config["projection_prng_key"])
        return LoadedProjections(self.name, b[:, None] * bb[: len(b)], d[:rank, None] * a[:rank])


@adapter_kind
class Pvera(Vera):
    """Scaled slices of shared random projections at the mean of their latents, on linear weights."""

    name = "pvera"
    peft_types = ("PVERA",)
    parts = ("pvera_lambda_b", "pvera_lambda_d")
    shared = ("pvera_A", "pvera_B")
    optional = shared
    options: ClassVar = {"sample_at_inference": (False, None)}
    halves = 2

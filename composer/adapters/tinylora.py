"""TinyLoRA: a few numbers that mix random matrices between singular vectors (arXiv:2602.04118; peft/tuners/tinylora).

base_model.tinylora_v.<group> [u]
base_model.model.<module>.tinylora_A [r, in]   tinylora_B [out, r]   tinylora_P [u, r, r]

R = Σᵢ vᵢ·Pᵢ     W += B·R·A     (an embedding is [out, in] = [V, d] here)
Which group a module belongs to is its place among the target modules of PEFT's model, which no file keeps. P tells it:
it is drawn by torch with the seed projection_seed + place.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import SHARED_PREFIX, ModuleKind, Parts, check_number, low_rank
from composer.deltas import BlockDelta, Delta, read_array
from composer.tensors import SafetensorsHeader, TensorSpec

__all__ = ["Tinylora"]

VECTORS = "tinylora_v."
PARTS = ("tinylora_A", "tinylora_B", "tinylora_P")
CLOSE = 0.05  # of the standard deviation: another draw differs by more, rounding to bf16 by less


@adapter_kind
class Tinylora(ModuleKind):
    """Low-rank deltas between singular vectors of linear (and Conv1D) weights and embeddings."""

    name = "tinylora"
    peft_types = ("TINYLORA",)
    parts = PARTS
    saved: ClassVar = {"save_projection": "its P follows from the order in which PEFT finds the modules of its model"}

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """As every kind; raises CorruptFileError unless there is a vector for each group of modules."""
        for field in ("weight_tying", "projection_seed"):
            check_number(config, field)
        if not 0 <= config["weight_tying"] <= 1 or type(config["projection_seed"]) is not int:
            found = {field: config[field] for field in ("weight_tying", "projection_seed")}
            raise damaged("adapter_config.json: weight_tying or projection_seed", "0 to 1, and an integer", found)
        super().check(config, header)
        groups = {name.removeprefix(VECTORS) for name in self._shared(header)}
        count = len(self._own(header))
        wanted = {str(_group(config, place, count)) for place in range(count)}
        if groups != wanted:
            raise damaged("the vectors of TinyLoRA are not those of its modules", sorted(wanted), sorted(groups))

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        shapes = {name: spec.shape for name, spec in parts.items()}
        a, b, p = (shapes[name] for name in PARTS)
        fits = len(a) == len(b) == 2 and len(p) == 3 and a[0] == b[1] == p[1] == p[2] and 0 not in (*a, *b, *p)
        if not fits or any(shape != p[:1] for name, shape in shapes.items() if name not in PARTS):
            found = {name: list(shape) for name, shape in shapes.items()}
            raise damaged(
                f"{module}: the parts of TinyLoRA do not fit", "A [r, in], B [out, r], P [u, r, r], v [u]", found
            )
        return (b[0], a[1])

    def deltas(self, config: dict[str, Any], header: SafetensorsHeader, names: Mapping[str, str]) -> list[Delta]:
        """As every kind; how many modules there are goes along, since that decides on the groups."""
        return super().deltas({**config, "modules": len(self._own(header))}, header, names)

    def build_module(self, config: dict[str, Any], module: str, parts: Parts) -> BlockDelta:
        """Raises CorruptFileError where P is not what torch draws for any place."""
        count = config["modules"]
        a, b, p = (read_array(parts[name]) for name in PARTS)
        groups = {_group(config, place, count) for place in range(count)}
        group = 0 if len(groups) == 1 else _group(config, _place(config, module, p), count)
        mixed = np.einsum("i,ijk->jk", read_array(parts[f"{VECTORS}{group}"]), p).astype(np.float32)
        return low_rank(b @ mixed, a)

    def _shared(self, header: SafetensorsHeader) -> dict[str, TensorSpec]:
        prefix = SHARED_PREFIX + VECTORS
        found = {name: spec for name, spec in header.tensors.items() if name.startswith(prefix)}
        return {name.removeprefix(SHARED_PREFIX): spec for name, spec in sorted(found.items())}


def _group(config: dict[str, Any], place: int, count: int) -> int:
    """Which vector the module at `place` of `count` has."""
    groups = max(1, round(count * (1.0 - config["weight_tying"])))
    return min(place // max(1, count // groups), groups - 1)


def _place(config: dict[str, Any], module: str, saved: np.ndarray) -> int:
    """The place of a module, by the seed that draws its P [u, r, r]."""
    drawn = _draws(saved.shape, config["projection_seed"], config["modules"])
    distance = np.abs(drawn - saved).max(axis=(1, 2, 3))
    place = int(distance.argmin())
    if distance[place] > CLOSE * saved.shape[1] ** -0.5:
        raise damaged(
            f"{module}: tinylora_P is not what torch draws for one of {len(drawn)} modules, so its vector is not known",
            f"numbers of one of the seeds from {config['projection_seed']} on",
            f"a distance of {distance[place]:.2g}",
        )
    return place


@lru_cache(maxsize=8)
def _draws(shape: tuple[int, ...], seed: int, count: int) -> np.ndarray:
    """[count, u, r, r]: P of every place."""
    import torch

    generators = (torch.Generator().manual_seed(seed + place) for place in range(count))
    draws = [torch.normal(0.0, shape[1] ** -0.5, shape, generator=generator).numpy() for generator in generators]
    return np.stack(draws)

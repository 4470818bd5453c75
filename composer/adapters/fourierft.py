"""FourierFT: a sparse spectrum, transformed back (arXiv:2405.03003; peft/tuners/fourierft/layer.py).

base_model.model.<module>.fourierft_spectrum [n]

W += scaling · Re(ifft2(S)), S [out, in] zero but for the spectrum at n places
The places are not in the file: they are the first n of torch.randperm(out · in), seeded with random_loc_seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts, check_number, unfit
from composer.adapters._places import random_places
from composer.deltas import BlockDelta, read_array

__all__ = ["Fourierft"]

CHUNK = 1 << 20  # numbers of the transform that are in memory at once, in complex128


@dataclass(frozen=True, slots=True)
class LoadedSpectrum:
    """The spectrum [n], float32, and the seed of its places."""

    spectrum: np.ndarray
    seed: int
    scale: float

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """All rows: the places depend on the base's shape. The transform goes over rows here, then over columns."""
        height, width = base.shape
        if len(self.spectrum) > height * width:
            raise unfit("fourierft", f"at least {len(self.spectrum)} numbers", [height, width])
        places = random_places(height * width, len(self.spectrum), self.seed)
        frequency, column = places // width, places % width
        out = np.empty((height, width), np.float32)
        step = max(1, CHUNK // max(width, len(places)))
        for first in range(0, height, step):
            rows = np.arange(first, min(first + step, height))
            turns = (rows[:, None] * frequency[None, :] % height) / height
            partial = np.zeros((len(rows), width), np.complex128)
            np.add.at(partial, (slice(None), column), self.spectrum * np.exp(2j * np.pi * turns) / height)
            out[rows] = np.fft.ifft(partial, axis=1).real * self.scale
        return out


@adapter_kind
class Fourierft(ModuleKind):
    """Sparse spectra of changes to linear (and Conv1D) weights."""

    name = "fourierft"
    peft_types = ("FOURIERFT",)
    parts = ("fourierft_spectrum",)
    numbers = ("scaling",)
    mixes_rows = True

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, int]:
        found = parts["fourierft_spectrum"].shape
        check_number(config, "random_loc_seed")
        if len(found) != 1 or not found[0] or type(config["random_loc_seed"]) is not int:
            raise damaged(
                f"{module}: the parts of FourierFT do not fit", "spectrum [n] and an integer seed", list(found)
            )
        return (ANY_SIZE, ANY_SIZE)

    def conditions(self, config: dict[str, Any], parts: Parts) -> tuple[str, ...]:
        return (f"product >= {parts['fourierft_spectrum'].shape[0]}",)

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        return LoadedSpectrum(
            read_array(parts["fourierft_spectrum"]), config["random_loc_seed"], float(config["scaling"])
        )

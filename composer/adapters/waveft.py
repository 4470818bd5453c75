"""WaveFT: a sparse wavelet spectrum, transformed back (arXiv:2505.12532; peft/tuners/waveft/layer.py).

base_model.model.<module>.waveft_spectrum [n]

W += scaling · IDWT(S), S zero but for the spectrum at n places; with use_idwt=false W += scaling · S
The places are not in the file: they are the first n of torch.randperm(out · in), seeded with random_loc_seed.
S is padded on both sides by what the filters cut off, and cut into the four bands: smooth, then what the high-pass
filter gives along the rows' index, along the columns' index, along both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from composer.adapters import ANY_SIZE, adapter_kind
from composer.adapters._common import damaged
from composer.adapters._modules import ModuleKind, Parts, check_number, unfit
from composer.adapters._places import random_places
from composer.deltas import BlockDelta, read_array
from composer.errors import MissingDependencyError
from composer.tensors import SafetensorsHeader

__all__ = ["Waveft"]

HAAR = (0.5**0.5, 0.5**0.5)  # db1
# Those that PEFT has as PyWavelets has them; its coif4 and coif5 are other numbers than the Coiflets'.
FAMILIES = (
    *(f"db{order}" for order in range(1, 11)),
    *(f"sym{order}" for order in range(2, 11)),
    *(f"coif{order}" for order in range(1, 4)),
)


@dataclass(frozen=True, slots=True)
class LoadedWavelets:
    """The spectrum [n], float32, the seed of its places and the low-pass filter, None without a transform."""

    spectrum: np.ndarray
    seed: int
    scale: np.float32
    low: np.ndarray | None

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """All rows: the places depend on the base's shape, and the filters reach over many."""
        height, width = base.shape
        if len(self.spectrum) > height * width:
            raise unfit("waveft", f"at least {len(self.spectrum)} numbers", [height, width])
        row, column = np.divmod(random_places(height * width, len(self.spectrum), self.seed), width)
        if self.low is None:
            dense = np.zeros((height, width), np.float32)
            dense[row, column] = self.spectrum
            return dense * self.scale
        cut = len(self.low) - 2
        padded = [size + cut + (size + cut) % 2 for size in (height, width)]
        dense = np.zeros(padded, np.float32)
        above, left = (padded[0] - height) // 2, (padded[1] - width) // 2
        dense[row + above, column + left] = self.spectrum
        # the right half takes the high-pass filter along the rows' index, the lower half along the columns'
        high = self.low[::-1] * np.where(np.arange(len(self.low)) % 2, -1, 1).astype(np.float32)
        half, middle = padded[0] // 2, padded[1] // 2
        smooth = _synthesis(dense[:half, :middle], self.low) + _synthesis(dense[half:, :middle], high)
        rough = _synthesis(dense[:half, middle:], self.low) + _synthesis(dense[half:, middle:], high)
        whole = (_synthesis(smooth.T, self.low) + _synthesis(rough.T, high)).T
        top, side = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 2
        return np.ascontiguousarray(whole[top : top + height, side : side + width]) * self.scale


@adapter_kind
class Waveft(ModuleKind):
    """Sparse wavelet spectra of changes to linear (and Conv1D) weights."""

    name = "waveft"
    peft_types = ("WAVEFT",)
    parts = ("waveft_spectrum",)
    numbers = ("scaling",)
    mixes_rows = True
    scratch = 24
    options: ClassVar = {"use_idwt": (True, False), "wavelet_family": FAMILIES}

    def shape(self, config: dict[str, Any], module: str, parts: Parts) -> tuple[int, ...]:
        found = parts["waveft_spectrum"].shape
        check_number(config, "random_loc_seed")
        if len(found) != 1 or not found[0] or type(config["random_loc_seed"]) is not int:
            raise damaged(f"{module}: the parts of WaveFT do not fit", "spectrum [n] and an integer seed", list(found))
        return (ANY_SIZE, ANY_SIZE)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """As every kind; raises MissingDependencyError where a filter is not known without PyWavelets."""
        super().check(config, header)
        _low_pass(config)

    def conditions(self, config: dict[str, Any], parts: Parts) -> tuple[str, ...]:
        return (f"product >= {parts['waveft_spectrum'].shape[0]}",)

    def build(self, config: dict[str, Any], parts: Parts) -> BlockDelta:
        spectrum = read_array(parts["waveft_spectrum"])
        return LoadedWavelets(spectrum, config["random_loc_seed"], np.float32(config["scaling"]), _low_pass(config))


def _low_pass(config: dict[str, Any]) -> np.ndarray | None:
    """The low-pass filter of the synthesis, float32; None where nothing is transformed."""
    if config.get("use_idwt", True) is False:
        return None
    family = config.get("wavelet_family", "db1")
    if family == "db1":
        return np.array(HAAR, np.float32)
    try:
        import pywt
    except ModuleNotFoundError:
        raise MissingDependencyError(
            f"the filters of the wavelet {family} come with PyWavelets",
            expected="PyWavelets",
            found="not installed",
            remedy="pip install PyWavelets",
        ) from None
    return np.array(pywt.Wavelet(family).rec_lo, np.float32)


def _synthesis(band: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Along the last axis: zeros between the numbers, the filter over them, and its ends cut off."""
    length = 2 * band.shape[1] - 2 + len(taps)
    out = np.zeros((band.shape[0], length), np.float32)
    for index, tap in enumerate(taps):
        out[:, index : index + 2 * band.shape[1] - 1 : 2] += tap * band
    cut = (2 * len(taps) - 3) // 2
    return out[:, cut : length - cut]

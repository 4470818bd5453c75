"""Rows of an embedding or an output head that were trained alone: W[i] = the saved row, the others stay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from composer.deltas import read_array
from composer.errors import CorruptFileError, TargetMismatchError
from composer.tensors import TensorSpec

__all__ = ["LoadedTokenRows", "TokenRows"]


@dataclass(frozen=True, slots=True)
class TokenRows:
    """W[indices] = tensor [n, d]; at a weight w of a recipe W + w·(W' − W).

    PEFT trains the rows of a tied pair as one (`shares_ends`), and may save them once more under the other end:
    `copies`, which must be equal.
    Source: PEFT's tuners/trainable_tokens/layer.py.
    """

    target: str
    tensor: TensorSpec
    indices: tuple[int, ...]
    copies: tuple[TensorSpec, ...] = ()
    shares_ends: bool = True
    replaces: bool = False
    whole: bool = False

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (self.tensor, *self.copies)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise TargetMismatchError where the base, of this shape, has no row for some token."""
        if max(self.indices) >= shape[0]:
            raise TargetMismatchError(
                f"{self.target}: the adapter trains token {max(self.indices)}, and the base has {shape[0]} rows",
                expected=f"at least {max(self.indices) + 1} rows",
                found=shape[0],
                remedy="resize the base as the training did (resize_token_embeddings), save it and compose with that",
                keys=[self.tensor.name],
            )

    def load(self) -> LoadedTokenRows:
        rows = read_array(self.tensor)
        for copy in self.copies:
            if not np.array_equal(read_array(copy), rows):
                raise CorruptFileError(
                    f"{copy.name} and {self.tensor.name} are the rows of one tied pair, but differ",
                    expected="equal rows",
                    found="other values",
                    remedy="the file is damaged: save the adapter again with PEFT",
                    tensor=copy.name,
                )
        return LoadedTokenRows(rows, np.array(self.indices))


@dataclass(frozen=True, slots=True)
class LoadedTokenRows:
    """The rows [n, d] in memory, float32, and the tokens they belong to, int64 [n]."""

    tokens: np.ndarray
    indices: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        return self.restored(start, stop, base) - base

    def restored(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """The new rows themselves, which base + (new − base) in float32 would not always give."""
        new = base.copy()
        inside = (self.indices >= start) & (self.indices < stop)
        new[self.indices[inside] - start] = self.tokens[inside]
        return new

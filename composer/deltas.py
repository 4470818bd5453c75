"""Changes to one tensor of the base, computed a block of rows at a time in float32 numpy arrays.

    LowRank    W += weight · scale · B·A           LoRA
    Replace    W  = tensor                         modules_to_save, trained biases

A delta knows where its tensors lie; `load()` reads them when the run comes to that tensor and not before. A kind whose
new weight W' is not a sum (IA3, OFT, DoRA) gives W' − W, which `rows` may compute from the base's own rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from composer.errors import CorruptFileError, NonFiniteError, TargetMismatchError
from composer.product import product
from composer.tensors import DTYPES, TensorSpec

__all__ = ["BlockDelta", "Delta", "LowRank", "Replace", "read_array"]


class BlockDelta(Protocol):
    """A loaded delta: float32 rows on demand."""

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """Rows [start, stop) of the unweighted delta (or of the new tensor), in the base's layout.

        base: the base's own rows [start, stop) as float32 [stop - start, numbers a row], not to be changed. Returns a
        new float32 array of that shape. May be called from several threads at once. Raises TargetMismatchError when the
        adapter carries a copy of its base's rows and these differ.
        """
        ...


class Delta(Protocol):
    """A change to the base tensor `target`."""

    @property
    def target(self) -> str:
        """The base tensor's own name."""
        ...

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        """The adapter tensors consumed; one that several deltas share is listed by each."""
        ...

    @property
    def replaces(self) -> bool:
        """Whether `rows` is the new value and not an addition."""
        ...

    @property
    def whole(self) -> bool:
        """Whether `rows` needs all rows of the base at once (it mixes rows, or takes norms of columns)."""
        ...

    def load(self) -> BlockDelta:
        """Read the adapter tensors into memory."""
        ...


def read_array(spec: TensorSpec) -> np.ndarray:
    """An adapter tensor as float32. Raises NonFiniteError when it holds NaN or infinity."""
    array = spec.read().astype(np.float32)
    if not np.isfinite(array).all():
        raise NonFiniteError(
            f"{spec.path.name}: {spec.name} holds NaN or infinity",
            expected="finite numbers",
            found=int((~np.isfinite(array)).sum()),
            remedy="the training diverged: publish an earlier step",
            tensor=spec.name,
        )
    return array


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale · B·A with A [r, in] and B [out, r]; `transposed` where the base keeps W as [in, out] (Conv1D, embeddings).

    Source: arXiv:2106.09685 §4.1; the order of operations is PEFT's get_delta_weight: the product in float32, then
    the scale, so that one adapter merged into bf16 equals PEFT's default merge bit for bit.
    PEFT saves `copy`, the base's own W, along with a LoRA on an embedding or an output head; it must be what this base
    holds. An `embedding` is [V, d] in every architecture. Only `plain` factors are those of a linear module: others are
    of a convolution, whose kernel [out, in, …] is a matrix by its first dimension, or of a bare parameter.
    """

    target: str
    a: TensorSpec
    b: TensorSpec
    scale: float
    transposed: bool = False
    copy: TensorSpec | None = None
    embedding: bool = False
    plain: bool = True
    replaces: bool = False
    whole: bool = False

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (self.a, self.b) if self.copy is None else (self.a, self.b, self.copy)

    def load(self) -> LoadedLowRank:
        a, b = read_array(self.a), read_array(self.b)
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return LoadedLowRank(
            np.ascontiguousarray(left), np.ascontiguousarray(right), np.float32(self.scale), self.copy, self.transposed
        )


@dataclass(frozen=True, slots=True)
class LoadedLowRank:
    """scale · left·right in the base's own layout: left [rows, r], right [r, columns], float32."""

    left: np.ndarray
    right: np.ndarray
    scale: np.float32
    copy: TensorSpec | None = None
    transposed: bool = False  # left is A, right is B

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        self.check_base(start, stop, base)
        return product(self.left[start:stop], self.right) * self.scale

    def check_base(self, start: int, stop: int, base: np.ndarray) -> None:
        """Raise TargetMismatchError when the adapter carries these rows of its base and `base` (float32) differs."""
        if self.copy is None:
            return
        width = self.copy.nbytes // self.copy.shape[0]
        raw = self.copy.read_bytes(start * width, stop * width)
        own = np.frombuffer(raw, DTYPES[self.copy.dtype]).reshape(base.shape).astype(np.float32)
        if not np.array_equal(own, base):
            raise TargetMismatchError(
                f"the adapter carries its base's {self.copy.name}, and this base holds other values",
                expected="the base that the adapter was trained on",
                found=f"differences in rows {start} to {stop - 1}",
                remedy="compose it with its own base",
                keys=[self.copy.name],
            )


@dataclass(frozen=True, slots=True)
class Replace:
    """The adapter carries the whole tensor: it takes the base's place. A weight other than 1 is refused by the plan.

    copies: the same once more, which must be equal. unused: what PEFT saves besides it and does not load again.
    shares_ends: PEFT saved it because the vocabulary was resized, so that it is of both ends where these are tied.
    rows, indices: rows [n, d] that were trained apart from it, and where in it they belong.
    """

    target: str
    tensor: TensorSpec
    copies: tuple[TensorSpec, ...] = ()
    unused: tuple[TensorSpec, ...] = ()
    shares_ends: bool = False
    rows: TensorSpec | None = None
    indices: tuple[int, ...] = ()
    replaces: bool = True
    whole: bool = False

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (self.tensor, *self.copies, *self.unused, *(() if self.rows is None else (self.rows,)))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise TargetMismatchError unless the base's tensor has this shape."""
        if self.tensor.shape != shape:
            raise TargetMismatchError(
                f"{self.tensor.name} takes the place of {self.target}, which has another shape",
                expected=list(self.tensor.shape),
                found=list(shape),
                remedy="compose it with the base that it was trained on",
                keys=[self.tensor.name],
            )

    def load(self) -> LoadedReplace:
        loaded = read_array(self.tensor)
        for copy in self.copies:
            if not np.array_equal(read_array(copy), loaded):
                raise CorruptFileError(
                    f"{copy.name} and {self.tensor.name} are one tensor of a tied base, but differ",
                    expected="equal numbers",
                    found="other values",
                    remedy="the training untied them: it belongs on a base with tie_word_embeddings false",
                    tensor=copy.name,
                )
        if self.rows is not None:
            loaded[list(self.indices)] = read_array(self.rows)
        return LoadedReplace(loaded)


@dataclass(frozen=True, slots=True)
class LoadedReplace:
    """The new tensor in memory, float32."""

    tensor: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        return np.atleast_1d(self.tensor)[start:stop].reshape(base.shape)

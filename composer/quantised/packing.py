"""Small integers packed into 32-bit words, and ranges of columns: what GPTQ, AWQ and compressed-tensors share.

The numbers that a layer decodes to are (integer − zero) · scale, rounded to the dtype of the scales, as the libraries'
own dequantisation returns them; each integer fits into float32 exactly, so there is one rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from composer.quantised import corrupt
from composer.tensors import DTYPES, TensorSpec

__all__ = ["WORD", "groups_of", "look_up", "read_columns", "read_rows", "rounded", "scaled", "unpack"]

WORD = 32


def read_rows(spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a matrix, in its own dtype."""
    size = DTYPES[spec.dtype].itemsize * spec.shape[1]
    return np.frombuffer(spec.read_bytes(start * size, stop * size), DTYPES[spec.dtype]).reshape(-1, spec.shape[1])


def read_columns(spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    """Columns [start, stop) of a matrix, in its own dtype."""
    (rows, columns), dtype = spec.shape, DTYPES[spec.dtype]
    size = dtype.itemsize
    raw = spec.read_pieces(start * size, (stop - start) * size, columns * size, rows)
    return np.frombuffer(raw, dtype).reshape(rows, stop - start)


def unpack(words: np.ndarray, bits: int, order: Sequence[int] | None = None) -> np.ndarray:
    """uint8 [..., 32 // bits] of int32 words [...]; the lowest bits hold number order[0] of its word (default: 0)."""
    count = WORD // bits
    out = np.empty((*words.shape, count), np.uint8)
    unsigned = words.view(np.uint32)
    for place, number in enumerate(order or range(count)):
        out[..., number] = (unsigned >> np.uint32(place * bits)) & np.uint32((1 << bits) - 1)
    return out


def look_up(values: np.ndarray, packed: np.ndarray, *, high_first: bool) -> np.ndarray:
    """float32 [2 n] that the halves of the bytes `packed` [n] stand for, out of 16 `values`."""
    codes = np.arange(256)
    first, second = (codes >> 4, codes & 15) if high_first else (codes & 15, codes >> 4)
    pairs = np.stack([values[first], values[second]], axis=1).astype(np.float32)
    return pairs.view(np.uint64).reshape(256)[packed].view(np.float32)  # both halves in one step


def groups_of(spec: TensorSpec | None, inputs: int, groups: int) -> np.ndarray:
    """The group of each input, as a g_idx says; without one, adjacent inputs share a group.

    Raises CorruptFileError when the g_idx names a group outside of [0, groups).
    """
    if spec is None:
        return np.arange(inputs) // -(-inputs // groups)
    index = spec.read()
    if index.size and not (int(index.min()) >= 0 and int(index.max()) < groups):
        raise corrupt(spec.name, f"numbers from 0 to {groups - 1}", f"{int(index.min())} to {int(index.max())}")
    return index


def scaled(integers: np.ndarray, zeros: np.ndarray | int, scales: np.ndarray, dtype: str) -> np.ndarray:
    """(integers − zeros) · scales as float32, rounded to `dtype`; the last two broadcast against the first."""
    values = integers.astype(np.float32)
    values -= np.float32(zeros) if isinstance(zeros, int) else zeros.astype(np.float32)
    values *= scales.astype(np.float32)
    return rounded(values, dtype)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers rounded to `dtype`, in float32."""
    if dtype == "F32":
        return values
    with np.errstate(over="ignore"):  # beyond fp16's range lies infinity, as in the library
        return values.astype(DTYPES[dtype]).astype(np.float32)

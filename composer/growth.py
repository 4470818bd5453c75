"""Tensors of a vocabulary that gains words: the base's rows as they are merged, with new ones between or behind them.

rows     0 … start        start … start + count        … V
         merged           prompts, or the mean         merged, where the base has as many
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from composer.kernels import Survival, cast_block
from composer.plan import NewRows, TensorJob
from composer.tensors import DTYPES

__all__ = ["grown_parts"]

Part = tuple[memoryview, Survival | None]
Merge = Callable[[int, int], Part]  # rows [start, stop) as they are written, and what was measured of their deltas


def grown_parts(job: TensorJob, new: NewRows, merge: Merge) -> Iterator[tuple[int, Callable[[], Part]]]:
    """(bytes, task) of each part of the grown tensor, in order; `merge` gives the rows that it has without `new`."""
    old = replace(job, new_rows=None)
    width = old.matrix[1] * DTYPES[old.dtype].itemsize
    if not width:
        return
    for start, stop in old.blocks:
        if start < new.start:
            last = min(stop, new.start)
            yield (last - start) * width, partial(_cut, merge, start, stop, start * width, last * width)
    yield new.count * width, partial(_new_rows, old, new, merge)
    for start, stop in old.blocks:
        if stop > new.start + new.count:
            first = max(start, new.start + new.count)
            yield (stop - first) * width, partial(_cut, merge, start, stop, first * width, stop * width)


def _cut(merge: Merge, start: int, stop: int, first: int, last: int) -> Part:
    """Bytes [first, last) of the tensor, which lie in the rows [start, stop)."""
    data, measured = merge(start, stop)
    begin = start * (len(data) // (stop - start))
    return data[first - begin : last - begin], measured


def _new_rows(old: TensorJob, new: NewRows, merge: Merge) -> Part:
    if new.prompts:
        rows = np.concatenate([prompt.load() for prompt in new.prompts]) / np.float32(new.scale)
    else:
        rows = np.repeat(_mean(old, new.start, merge)[None], new.count, 0)
    rows = np.ascontiguousarray(cast_block(rows, old.dtype, old.name))
    return memoryview(rows.reshape(-1).view(np.uint8)), None


def _mean(old: TensorJob, rows: int, merge: Merge) -> np.ndarray:
    """The mean of the first `rows` rows as they are written, float32 [numbers a row]."""
    total = np.zeros(old.matrix[1])
    for start, stop in old.blocks:
        if start < rows:
            block = np.frombuffer(merge(start, stop)[0], DTYPES[old.dtype]).reshape(stop - start, -1)
            total += block[: rows - start].astype(np.float64).sum(0)
    return (total / rows).astype(np.float32)

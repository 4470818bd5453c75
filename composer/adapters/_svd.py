"""What singular values say of a base's weight: the part that its smallest ones make up."""

from __future__ import annotations

import numpy as np

__all__ = ["SCRATCH", "smallest_part"]

SCRATCH = 32  # bytes a number of the weight: both sets of singular vectors, and LAPACK's own copies


def smallest_part(weight: np.ndarray, count: int) -> np.ndarray:
    """The sum of the `count` smallest singular components of a weight [rows, columns], float32.

    It does not depend on the signs that a linear-algebra library gives its singular vectors, as these themselves do.
    """
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    first = len(values) - count
    return (left[:, first:] * values[first:]) @ right[first:]

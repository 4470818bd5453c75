"""How many numbers of a tensor are NaN or infinite, a chunk at a time."""

from __future__ import annotations

import numpy as np

from composer.tensors import DTYPES, TensorSpec

__all__ = ["count_nonfinite"]

# The bits of the exponent: all of them set is NaN or an infinity. Two of the 8-bit formats have no infinity.
EXPONENTS = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
    "F8_E5M2": (np.uint8, 0x7C),
}


def count_nonfinite(spec: TensorSpec) -> int:
    """The count, 0 for integers. Raises CorruptFileError when the file is short."""
    if spec.dtype == "F8_E4M3":
        return sum(int((~np.isfinite(np.frombuffer(c, DTYPES[spec.dtype]))).sum()) for c in spec.chunks())
    if spec.dtype not in EXPONENTS:
        return 0
    word, mask = EXPONENTS[spec.dtype]
    exponent = word(mask)
    return sum(int(np.count_nonzero((np.frombuffer(c, word) & exponent) == exponent)) for c in spec.chunks())

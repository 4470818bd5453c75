"""How many numbers of a tensor are NaN or infinite, a chunk at a time.

All bits of the exponent set is NaN or an infinity. Adding one to the lowest of them carries into the sign bit, which
was cleared, exactly then: so eight bytes are asked at once, and numbers are only counted where there is something.
"""

from __future__ import annotations

import numpy as np

from composer.tensors import DTYPES, TensorSpec

__all__ = ["count_nonfinite"]

EXPONENTS = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
    "F8_E5M2": (np.uint8, 0x7C),
}
WIDE = np.dtype(np.uint64)


def count_nonfinite(spec: TensorSpec) -> int:
    """The count, 0 for integers. Raises CorruptFileError when the file is short."""
    if spec.dtype == "F8_E4M3":  # has no infinity, and one NaN
        return sum(int((~np.isfinite(np.frombuffer(c, DTYPES[spec.dtype]))).sum()) for c in spec.chunks())
    if spec.dtype not in EXPONENTS:
        return 0
    word, mask = EXPONENTS[spec.dtype]
    return sum(_count(np.frombuffer(chunk, word), mask) for chunk in spec.chunks())


def _count(numbers: np.ndarray, mask: int) -> int:
    lanes = WIDE.itemsize // numbers.itemsize
    whole = len(numbers) - len(numbers) % lanes
    exponents, ones, signs = (
        _repeated(value, numbers.itemsize) for value in (mask, mask & -mask, mask + (mask & -mask))
    )
    wide = numbers[:whole].view(WIDE) & exponents
    wide += ones
    suspicious = bool(np.bitwise_or.reduce(wide) & signs) if len(wide) else False
    left = numbers if suspicious else numbers[whole:]
    exponent = numbers.dtype.type(mask)
    return int(np.count_nonzero((left & exponent) == exponent))


def _repeated(value: int, size: int) -> np.uint64:
    """The same word of `size` bytes in all of eight bytes."""
    return WIDE.type(int.from_bytes(value.to_bytes(size, "little") * (WIDE.itemsize // size), "little"))

"""One tensor of a full fine-tune as the bits that differ from its base's.

bits     U8     zlib of the XOR of both tensors' bits, byte planes apart: first all lowest bytes, …, last all highest
rows     U32    crc32 of each row of the base's bits, so that another base is noticed

The highest bytes (sign, exponent) hardly change in a fine-tune, so their plane is nearly all zeros.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from composer.errors import CorruptFileError, NonFiniteError, TargetMismatchError
from composer.tensors import DTYPES, TensorSpec

__all__ = ["BITS", "CheckpointDelta", "LoadedCheckpointDelta", "pack", "row_checksums", "unpack"]

BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
LEVEL = 6


def pack(bits: np.ndarray) -> np.ndarray:
    """Unsigned integers of any shape to compressed bytes, uint8 [n]."""
    planes = np.ascontiguousarray(bits.reshape(-1).view(np.uint8).reshape(bits.size, bits.itemsize).T)
    return np.frombuffer(zlib.compress(planes, LEVEL), np.uint8)


def unpack(spec: TensorSpec, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """What `pack` was given, flat. Raises CorruptFileError unless it is exactly the bits of such a tensor."""
    count, itemsize = math.prod(shape), DTYPES[dtype].itemsize
    stream = zlib.decompressobj()
    try:
        planes = stream.decompress(spec.read_bytes(0, spec.nbytes), count * itemsize)
        rest = stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error:
        planes, rest = b"", b""
    if len(planes) != count * itemsize or rest or not stream.eof or stream.unused_data:
        raise CorruptFileError(
            f"{spec.name} does not hold the bits of a tensor {dtype} {list(shape)}",
            expected=f"{count * itemsize} bytes, compressed",
            found=f"{len(planes)} bytes" if planes else "something else",
            remedy="the file is damaged: make the delta again",
            tensor=spec.name,
        )
    matrix = np.frombuffer(planes, np.uint8).reshape(itemsize, count)
    return np.ascontiguousarray(matrix.T).view(BITS[dtype]).reshape(-1)


def row_checksums(bits: np.ndarray) -> np.ndarray:
    """crc32 of each row of [rows, columns], uint32 [rows]."""
    return np.fromiter((zlib.crc32(row) for row in np.ascontiguousarray(bits)), np.uint32, len(bits))


@dataclass(frozen=True, slots=True)
class CheckpointDelta:
    """W' − W, where W' is known by its bits: weight 1 gives W' bit for bit, a weight w gives W + w·(W' − W)."""

    target: str
    bits: TensorSpec
    checksums: TensorSpec
    dtype: str
    shape: tuple[int, ...]
    replaces: bool = False
    whole: bool = False
    shares_ends: bool = True  # it changes what is stored, so a tied pair stays one

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        return (self.bits, self.checksums)

    @property
    def loaded_bytes(self) -> int:
        """Held in memory while the tensor is composed; too much work to load for each block anew."""
        return 2 * math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def load(self) -> LoadedCheckpointDelta:
        rows = self.shape[0] if self.shape else 1
        flat = unpack(self.bits, self.dtype, self.shape)
        return LoadedCheckpointDelta(self.target, self.dtype, flat.reshape(rows, -1), self.checksums.read())


@dataclass(frozen=True, slots=True)
class LoadedCheckpointDelta:
    """The XOR [rows, columns] and the base's checksums [rows] in memory."""

    target: str
    dtype: str
    bits: np.ndarray
    checksums: np.ndarray

    def rows(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        return self.restored(start, stop, base) - base

    def restored(self, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """The fine-tune's own rows as float32, which holds the number formats of BITS exactly.

        Raises TargetMismatchError when `base`, float32, is not the base that the delta was made against, NonFiniteError
        when the fine-tune holds NaN or infinity.
        """
        own = base.astype(DTYPES[self.dtype]).view(BITS[self.dtype])
        new = self.restored_bits(start, stop, own).view(DTYPES[self.dtype]).astype(np.float32)
        if not np.isfinite(new).all():
            raise NonFiniteError(
                f"the fine-tune's {self.target} holds NaN or infinity",
                expected="finite numbers",
                found=int((~np.isfinite(new)).sum()),
                remedy="the training diverged: take an earlier checkpoint",
                tensor=self.target,
            )
        return new

    def restored_bits(self, start: int, stop: int, own: np.ndarray) -> np.ndarray:
        """The fine-tune's rows as bits. `own`: the base's, [stop - start, columns]; raises TargetMismatchError."""
        wrong = np.flatnonzero(row_checksums(own) != self.checksums[start:stop])
        if len(wrong):
            raise TargetMismatchError(
                f"the delta of {self.target} was made against another base",
                expected="the very base whose bits differ from the fine-tune's by this delta",
                found=f"{len(wrong)} rows with other values, the first is row {start + int(wrong[0])}",
                remedy="compose it with its own base, in its own number format",
                keys=[self.target],
            )
        return own ^ self.bits[start:stop]

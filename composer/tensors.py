"""Safetensors headers and ranged reads.

    8 bytes   little-endian u64 n
    n bytes   JSON {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}
    rest      data, no holes, no overlap

The header is validated by us before anything trusts it: the reference reader accepts duplicate keys (the last one
wins) and control characters in names. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from composer.errors import CorruptFileError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DTYPES", "FLOAT_DTYPES", "ArraySpec", "SafetensorsHeader", "TensorSpec", "encode_header", "read_header"]

MAX_HEADER_BYTES = 100_000_000
MAX_NAME_LENGTH = 1024
DATA_ALIGNMENT = 4096
COPY_BYTES = 1 << 20

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one tensor lies: `offset` is absolute in the file at `path`, sizes are in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path

    def read(self) -> np.ndarray:
        """The whole tensor as a numpy array of its own dtype. Raises CorruptFileError when the file is short."""
        return np.frombuffer(self.read_bytes(0, self.nbytes), DTYPES[self.dtype]).reshape(self.shape)

    def read_bytes(self, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of the tensor's data."""
        buffer = bytearray(stop - start)
        self.read_into(start, memoryview(buffer))
        return buffer

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's data from byte `start` on."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start)
            _fill(file, buffer, self)

    def read_pieces(self, start: int, size: int, step: int, count: int) -> bytearray:
        """`count` pieces of `size` bytes of the data, the first at `start`, one every `step`: columns of a matrix."""
        buffer = bytearray(size * count)
        with self.path.open("rb", buffering=0) as file:
            for index in range(count):
                file.seek(self.offset + start + index * step)
                _fill(file, memoryview(buffer)[index * size : (index + 1) * size], self)
        return buffer

    def chunks(self, size: int = COPY_BYTES) -> Iterator[memoryview]:
        """The tensor's data in order, `size` bytes at a time; each view is valid until the next one is asked for."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            buffer = bytearray(min(size, self.nbytes) or 1)
            left = self.nbytes
            while left:
                view = memoryview(buffer)[: min(size, left)]
                _fill(file, view, self)
                yield view
                left -= len(view)


@dataclass(frozen=True, slots=True)
class ArraySpec(TensorSpec):
    """A tensor that lies in memory, where one of a file is expected; `path` is the file it is made for."""

    data: memoryview

    @classmethod
    def like(cls, spec: TensorSpec, array: np.ndarray, shape: tuple[int, ...] | None = None) -> ArraySpec:
        """The bytes of a contiguous array in place of those of `spec`, in its dtype and, unless given, its shape."""
        view = memoryview(array.reshape(-1).view(np.uint8))
        return cls(spec.name, spec.dtype, spec.shape if shape is None else shape, 0, len(view), spec.path, view)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's data from byte `start` on."""
        buffer[:] = self.data[start : start + len(buffer)]


def _fill(file: Any, buffer: bytearray | memoryview, spec: TensorSpec) -> None:
    view = memoryview(buffer)
    while view:
        got = file.readinto(view)
        if not got:
            raise CorruptFileError(
                f"{spec.path.name}: the data of {spec.name!r} ends {len(view)} bytes early",
                expected=f"{spec.nbytes} bytes at offset {spec.offset}",
                found=f"a file of {os.path.getsize(spec.path)} bytes",
                remedy="the file changed or was cut while it was read: fetch it again",
                tensor=spec.name,
            )
        view = view[got:]


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A validated header; `tensors` is in data order."""

    path: Path
    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]
    size: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read and validate the header of one safetensors file; the data is not touched.

    Raises NotFoundError, or CorruptFileError that names what is wrong (length, JSON, duplicate key, dtype, shape,
    ranges that overlap, leave holes or do not end at the end of the file).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _corrupt(path, f"a header length between 2 and {max(size - 8, 0)}", length)
            raw = file.read(length)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist", remedy="check the path", path=path) from None
    try:
        entries = json.loads(raw, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits, too deep
        raise _corrupt(path, "a JSON header", f"{type(error).__name__}: {error}") from None
    if not isinstance(entries, dict) or raw[:1] != b"{":
        raise _corrupt(path, "a JSON object as header", type(entries).__name__)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null; the reference reader takes it for none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "__metadata__ that maps strings to strings", metadata)
    specs = sorted(
        (_spec(path, name, entry, 8 + length) for name, entry in entries.items()), key=lambda s: (s.offset, s.nbytes)
    )
    position = 8 + length
    for spec in specs:
        if spec.offset != position:
            raise _corrupt(path, f"data of {spec.name!r} at byte {position}", f"byte {spec.offset}")
        position += spec.nbytes
    if position != size:
        raise _corrupt(path, f"a file of {position} bytes, as its header says", f"{size} bytes")
    return SafetensorsHeader(path, {spec.name: spec for spec in specs}, metadata, size)


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _corrupt(path, "each key once", sorted(key for key, count in counts.items() if count > 1)[:20])
    return entries


def _spec(path: Path, name: str, entry: Any, data_start: int) -> TensorSpec:
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable() or ".." in name.split("/"):
        raise _corrupt(path, "printable tensor names without path traversal", repr(name[:80]))
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, f"dtype, shape and data_offsets for {name!r}", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _corrupt(path, f"a dtype of {', '.join(DTYPES)} for {name!r}", dtype)
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _corrupt(path, f"natural numbers as shape and data_offsets of {name!r}", entry)
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _corrupt(path, f"{nbytes} bytes of data for {name!r} {dtype} {shape}", f"{offsets[1] - offsets[0]} bytes")
    return TensorSpec(name, dtype, tuple(shape), data_start + offsets[0], nbytes, path)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _corrupt(path: Path, expected: Any, found: Any) -> CorruptFileError:
    return CorruptFileError(
        f"{path.name} is not a valid safetensors file: expected {expected}, found {found}",
        expected=expected,
        found=found,
        remedy="fetch or save the file again with the safetensors library",
        path=path,
    )


def encode_header(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The length prefix and header for (name, dtype, shape) laid out in the given order.

    Padded with spaces so that the data begins at a multiple of 4096 bytes: a memory map of the file is then aligned
    for ONNX Runtime and cuBLAS. Every safetensors reader accepts the padding.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-(8 + len(body)) % DATA_ALIGNMENT)
    return struct.pack("<Q", len(body)) + body

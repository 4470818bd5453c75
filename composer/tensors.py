"""Safetensors headers and ranged reads.

    8 bytes   little-endian u64 n
    n bytes   JSON {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}
    rest      data, no holes, no overlap

The header is validated by us before anything trusts it: the reference reader accepts duplicate keys (the last one
wins), control characters and `../` in names, hundreds of thousands of empty tensors and any amount of metadata.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from composer.errors import CorruptFileError, NotFoundError
from composer.files import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "DTYPES",
    "FLOAT_DTYPES",
    "ArraySpec",
    "SafetensorsHeader",
    "TensorSpec",
    "encode_header",
    "is_tensor_name",
    "read_adapter_header",
    "read_header",
]

MAX_HEADER_BYTES = 100_000_000  # the format's own limit; the rest are ours, far above what any model has
MAX_ADAPTER_HEADER_BYTES = 32 << 20
MAX_METADATA_BYTES = 8 << 20
MAX_METADATA_KEYS = 10_000
MAX_TENSORS = 200_000
MAX_EMPTY_TENSORS = 1_000
MAX_DIMENSIONS = 32
MAX_EMPTY_SIZE = 2**31  # of a tensor without data, which no file size bounds
MAX_TOKENS = 10_000_000  # commas and brackets in a header: what bounds the memory of parsing it
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


def read_header(path: Path, *, limit: int = MAX_HEADER_BYTES) -> SafetensorsHeader:
    """Read and validate the header of one safetensors file; the data is not touched.

    limit: the most bytes that the header may have. Raises NotFoundError, or CorruptFileError that names what is wrong
    (length, JSON, duplicate key, too much of something, name, dtype, shape, ranges that overlap, leave holes or do not
    end at the end of the file).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            longest = min(limit, MAX_HEADER_BYTES, size - 8)
            if not 2 <= length <= longest:
                raise _corrupt(path, f"a header length between 2 and {max(longest, 0)}", length)
            raw = file.read(length)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist", remedy="check the path", path=path) from None
    if raw[:1] != b"{":
        raise _corrupt(path, "a header that begins with {", repr(raw[:8])[1:])
    tokens = sum(map(raw.count, (b",", b"[", b"{")))
    if tokens > MAX_TOKENS:
        raise _corrupt(path, f"at most {MAX_TOKENS} commas and brackets in the header", tokens)
    try:
        entries = parse_json(raw)
    except (ValueError, RecursionError) as error:  # not JSON that all read alike
        raise _corrupt(path, "a JSON header", f"{type(error).__name__}: {error}") from None
    metadata = _metadata(path, entries.pop("__metadata__", None))
    if len(entries) > MAX_TENSORS:
        raise _corrupt(path, f"at most {MAX_TENSORS} tensors", len(entries))
    specs = sorted(
        (_spec(path, name, entry, 8 + length) for name, entry in entries.items()), key=lambda s: (s.offset, s.nbytes)
    )
    if (empty := sum(spec.nbytes == 0 for spec in specs)) > MAX_EMPTY_TENSORS:
        raise _corrupt(path, f"at most {MAX_EMPTY_TENSORS} tensors without data", empty)
    position = 8 + length
    for spec in specs:
        if spec.offset != position:
            raise _corrupt(path, f"data of {spec.name!r} at byte {position}", f"byte {spec.offset}")
        position += spec.nbytes
    if position != size:
        raise _corrupt(path, f"a file of {position} bytes, as its header says", f"{size} bytes")
    return SafetensorsHeader(path, {spec.name: spec for spec in specs}, metadata, size)


def read_adapter_header(path: Path) -> SafetensorsHeader:
    """As `read_header`, for a file that a stranger made: a header of 32 MiB names more than any adapter changes."""
    return read_header(path, limit=MAX_ADAPTER_HEADER_BYTES)


def _metadata(path: Path, found: Any) -> dict[str, str]:
    """The free texts of a header. MLX writes null; the reference reader takes it for none."""
    metadata = {} if found is None else found
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "__metadata__ that maps strings to strings", type(metadata).__name__)
    nbytes = sum(len(key) + len(value) for key, value in metadata.items())
    if len(metadata) > MAX_METADATA_KEYS or nbytes > MAX_METADATA_BYTES:
        limits = f"at most {MAX_METADATA_KEYS} texts of {MAX_METADATA_BYTES} characters in __metadata__"
        raise _corrupt(path, limits, f"{len(metadata)} texts of {nbytes} characters")
    return metadata


def _spec(path: Path, name: str, entry: Any, data_start: int) -> TensorSpec:
    if not is_tensor_name(name):
        raise _corrupt(path, "printable tensor names that are no paths", repr(name[:80]))
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, f"dtype, shape and data_offsets for {name!r}", str(entry)[:200])
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _corrupt(path, f"a dtype of {', '.join(DTYPES)} for {name!r}", str(dtype)[:80])
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        limits = f"two natural numbers as data_offsets of {name!r}, and at most {MAX_DIMENSIONS} as its shape"
        raise _corrupt(path, limits, str(entry)[:200])
    if 0 in shape and max(shape) >= MAX_EMPTY_SIZE:
        raise _corrupt(path, f"sizes under {MAX_EMPTY_SIZE} of {name!r}, which has no data", shape)
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _corrupt(path, f"{nbytes} bytes of data for {name!r} {dtype} {shape}", f"{offsets[1] - offsets[0]} bytes")
    return TensorSpec(name, dtype, tuple(shape), data_start + offsets[0], nbytes, path)


def is_tensor_name(name: str) -> bool:
    """Whether a tensor may be called so: printable, not too long, and no path out of a folder on any system."""
    parts = name.replace("\\", "/").split("/")
    return 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable() and ".." not in parts and parts[0] != ""


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

"""GGUF files, as llama.cpp writes them: header, metadata and where each tensor lies; the data is not touched.

    "GGUF"  u32 version  u64 tensors  u64 pairs
    pairs     key, u32 type, value                        vocabulary and merges are skipped over, not kept
    tensors   name, u32 n, u64 dimensions[n], u32 type, u64 offset      the fastest dimension first
    padding to general.alignment (32)
    data

The sizes of the block types are those of the gguf package; its own reader builds every word of the vocabulary, which
takes seconds a file. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from composer.errors import CorruptFileError, UnsupportedQuantisationError
from composer.tensors import MAX_TENSORS, SafetensorsHeader, TensorSpec, is_tensor_name

__all__ = ["GgufSpec", "read_gguf"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_STRING = 16 << 20  # one string, and all that are kept
MAX_PAIRS = 100_000
MAX_DIMENSIONS = 4
# Types that are stored number by number, under the names that safetensors has for them.
PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


@dataclass(frozen=True, slots=True)
class GgufSpec(TensorSpec):
    """One tensor of a GGUF file: `ggml` is its type; of a block type, `dtype` is U8 and a row is counted in bytes.

    `logical` is the shape in numbers, slowest dimension first, as safetensors has it.
    """

    ggml: str
    logical: tuple[int, ...]


def read_gguf(path: Path) -> tuple[SafetensorsHeader, dict[str, Any]]:
    """The tensors of one GGUF file in data order, and its metadata without the arrays.

    Raises CorruptFileError that names what is wrong, or UnsupportedQuantisationError for a type that is not known.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise _corrupt(path, "the magic GGUF", "something else")
        try:
            version, tensors, pairs = (_number(file, code) for code in ("<I", "<Q", "<Q"))
            if version not in VERSIONS:
                raise _corrupt(path, f"version {' or '.join(map(str, VERSIONS))}, little-endian", version)
            if tensors > MAX_TENSORS or pairs > MAX_PAIRS:
                raise _corrupt(path, f"at most {MAX_TENSORS} tensors and {MAX_PAIRS} pairs", f"{tensors} and {pairs}")
            metadata: dict[str, Any] = {}
            kept_bytes = 0
            for _ in range(pairs):
                key = _string(file)
                value = _value(file, _number(file, "<I"))
                if key in metadata:
                    raise _corrupt(path, "each key once", key)
                metadata[key] = value
                kept_bytes += len(key) + (len(value) if isinstance(value, str) else 8)
                if kept_bytes > MAX_STRING:
                    raise _corrupt(path, f"metadata of {MAX_STRING} bytes beside its arrays", "more")
            entries = [_entry(file) for _ in range(tensors)]
        except (struct.error, ValueError, OverflowError, OSError) as error:
            raise _corrupt(path, "a header of GGUF", f"{type(error).__name__}: {error}") from None
        end = file.tell()
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise _corrupt(path, "a positive general.alignment", alignment)
    start = -(-end // alignment) * alignment
    specs = sorted((_spec(path, start, *entry) for entry in entries), key=lambda spec: spec.offset)
    position = start
    for spec in specs:
        if spec.offset < position or spec.offset + spec.nbytes > size:
            raise _corrupt(path, f"data of {spec.name!r} between bytes {position} and {size}", spec.offset)
        position = spec.offset + spec.nbytes
    if len({spec.name for spec in specs}) != len(specs):
        raise _corrupt(path, "each tensor once", "a name twice")
    kept = {key: value for key, value in metadata.items() if value is not None}
    return SafetensorsHeader(path, {spec.name: spec for spec in specs}, {}, size), kept


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack(code, file.read(struct.calcsize(code)))[0]


def _string(file: BinaryIO) -> str:
    length = _number(file, "<Q")
    raw = file.read(length) if length <= MAX_STRING else b""
    if len(raw) != length:
        raise ValueError(f"a string of {length} bytes")
    return raw.decode()


def _value(file: BinaryIO, kind: int) -> Any:
    """A scalar or a string; None for an array, which is skipped."""
    if kind in SCALARS:
        return _number(file, SCALARS[kind])
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        raise ValueError(f"a value of type {kind}")
    element, count = _number(file, "<I"), _number(file, "<Q")
    if element in SCALARS:
        file.seek(struct.calcsize(SCALARS[element]) * count, 1)
    elif element == STRING:
        for _ in range(count):
            # Read, not sought: a seek throws the buffer away, and a vocabulary has many short words.
            length = _number(file, "<Q")
            if length > MAX_STRING or len(file.read(length)) != length:
                raise ValueError(f"a string of {length} bytes")
    else:
        raise ValueError(f"an array of type {element}")
    return None


def _entry(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name, count = _string(file), _number(file, "<I")
    if not 1 <= count <= MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has {count} dimensions")
    shape = tuple(_number(file, "<Q") for _ in range(count))[::-1]
    return name, shape, _number(file, "<I"), _number(file, "<Q")


def _spec(path: Path, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufSpec:
    import gguf

    try:
        ggml = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise UnsupportedQuantisationError(
            f"{path.name}: {name} is of the GGUF type {kind}, which is not known",
            expected=[known.name for known in gguf.GGMLQuantizationType],
            found=kind,
            remedy="convert the model again with a current llama.cpp, to Q8_0 or F16 for instance",
        ) from None
    if not is_tensor_name(name) or 0 in shape:
        raise _corrupt(path, "printable names that are no paths, and no dimension of 0", f"{name[:80]!r} {list(shape)}")
    block, nbytes = gguf.GGML_QUANT_SIZES[ggml]
    if shape[-1] % block:
        raise _corrupt(path, f"rows of {name!r} in blocks of {block}", shape[-1])
    total = math.prod(shape) // block * nbytes
    plain = PLAIN.get(ggml.name)
    stored = shape if plain else (*shape[:-1], shape[-1] // block * nbytes)
    return GgufSpec(name, plain or "U8", stored, start + offset, total, path, ggml.name, shape)


def _corrupt(path: Path, expected: Any, found: Any) -> CorruptFileError:
    return CorruptFileError(
        f"{path.name} is not a valid GGUF file: expected {expected}, found {found}",
        expected=expected,
        found=found,
        remedy="fetch the file again, or convert the model anew with llama.cpp",
        path=path,
    )

"""The files of adapters that lie in one graph: their factors as vectors, one file for each length of vector.

adapters-576.safetensors         vectors [n, 576] F32   row 0 is zero; a factor is r rows, one after the other: of A the
                                                        columns (in = 576), of B the rows (out = 576)
adapters-index-3.safetensors     rows [4, p] I32        of the base (all 0) and of each of 3 adapters: which row of its
                                                        file each of the graph's p places takes; 0 beyond its rank

A file of vectors only ever grows at its end, so an adapter is added without touching what is there; ranks, targets and
sizes may be any. The index is small (8 bytes for 2 numbers of the rank, against 4 (in + out)) and is written anew.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from composer.errors import CorruptFileError
from composer.sinks import FolderSink, storage_errors
from composer.tensors import TensorSpec, encode_header, read_header
from composer.writer import HashingWriter

__all__ = [
    "Block",
    "VectorFiles",
    "append_vectors",
    "encode_index",
    "index_file",
    "index_size",
    "index_spec",
    "seal",
    "vectors_file",
    "vectors_size",
    "vectors_spec",
]

VECTORS, ROWS = "vectors", "rows"


@dataclass(frozen=True, slots=True)
class Block:
    """The factors of one module in one adapter: its rank, and the first row of A and of B in their files."""

    rank: int
    a: int
    b: int


def vectors_file(width: int) -> str:
    """The file of the vectors of this length."""
    return f"adapters-{width}.safetensors"


def index_file(adapters: int) -> str:
    """The index of so many adapters."""
    return f"adapters-index-{adapters}.safetensors"


def encode_index(index: np.ndarray) -> bytes:
    """The file of an int32 index [1 + adapters, places]."""
    return _index_header(*index.shape) + np.ascontiguousarray(index, np.int32).tobytes()


def index_size(adapters: int, places: int) -> int:
    """Bytes of that file."""
    return len(_index_header(1 + adapters, places)) + 4 * (1 + adapters) * places


def index_spec(folder: Path, adapters: int, places: int) -> TensorSpec:
    """Where the index lies, or will lie."""
    offset, shape = len(_index_header(1 + adapters, places)), (1 + adapters, places)
    return TensorSpec(ROWS, "I32", shape, offset, 4 * shape[0] * shape[1], folder / index_file(adapters))


def vectors_size(width: int, rows: int) -> int:
    """Bytes of a file of so many vectors."""
    return len(_header(width, rows)) + 4 * width * rows


def _index_header(rows: int, places: int) -> bytes:
    return encode_header([(ROWS, "I32", (rows, places))], {"format": "pt"})


def _header(width: int, rows: int) -> bytes:
    return encode_header([(VECTORS, "F32", (rows, width))], {"format": "pt"})


class VectorFiles:
    """New files of vectors in a sink, filled side by side; `counts` are the rows that each length will have."""

    def __init__(self, sink: FolderSink, counts: Mapping[int, int]) -> None:
        self._sink, self._counts = sink, counts
        self._next: Counter[int] = Counter()
        self._writers: dict[int, HashingWriter] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for width, rows in sorted(self._counts.items()):
                writer = stack.enter_context(self._sink.open(vectors_file(width)))
                writer.write(_header(width, rows))
                self._writers[width] = writer
                self.add(np.zeros((1, width), np.float32))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.__exit__(*raised)  # type: ignore[arg-type]

    def add(self, vectors: np.ndarray) -> int:
        """Append float32 [n, width]; returns the row of the first."""
        width = vectors.shape[1]
        first = self._next[width]
        self._next[width] += len(vectors)
        self._writers[width].write(memoryview(np.ascontiguousarray(vectors).reshape(-1).view(np.uint8)))
        return first


def vectors_spec(folder: Path, width: int, rows: int | None = None) -> TensorSpec:
    """Where the vectors of a length lie; rows: how many of them count, where the file may have been cut while it grew.

    Raises CorruptFileError for a file that has fewer.
    """
    path = folder / vectors_file(width)
    if rows is None:
        return read_header(path).tensors[VECTORS]
    offset, nbytes = len(_header(width, rows)), 4 * width * rows
    if path.stat().st_size < offset + nbytes:
        raise CorruptFileError(
            f"{path.name} is shorter than its graph says",
            expected=f"{offset + nbytes} bytes",
            found=f"{path.stat().st_size} bytes",
            remedy="compose it again",
            path=path,
        )
    return TensorSpec(VECTORS, "F32", (rows, width), offset, nbytes, path)


def append_vectors(folder: Path, width: int, rows: int, chunks: Iterable[memoryview]) -> None:
    """Write more vectors behind the first `rows` of a file, and have them on the disk; the header is not changed."""
    end = vectors_spec(folder, width, rows)
    with storage_errors(f"appending to {end.path.name}"), end.path.open("r+b") as file:
        file.truncate(end.offset + end.nbytes)
        file.seek(end.offset + end.nbytes)
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def seal(folder: Path, width: int, rows: int) -> None:
    """Have the header of a file say that it has `rows` vectors, and the file end with them."""
    spec = vectors_spec(folder, width, rows)
    with storage_errors(f"writing {spec.path.name}"), spec.path.open("r+b") as file:
        file.write(_header(width, rows))
        file.truncate(spec.offset + spec.nbytes)
        file.flush()
        os.fsync(file.fileno())

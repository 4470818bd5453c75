"""Digests of the chunks of a file, so that any range of it is checked as it is read.

store/chunks/ab/abcd…    of the file whose sha256 is abcd…, where it is larger than one chunk:
    16 bytes   "adapter-chunks/1"
    u64        bytes of the file
    32 × n     BLAKE3 of each MiB
    32 bytes   BLAKE3 of all before it

A list is made in the pass that gives a file its sha256, and again by the first reader where it is missing or damaged:
the file must have its sha256 then. So a list is never trusted further than the file's own name, and losing all of them
costs one pass over what is read. A file of one chunk needs none.

reader(path, sha256).read_at(start, count)    bytes that are what was stored
verify(path, sha256)                          all of it
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from composer.sinks import storage_errors
from registry.errors import BlobCorruptError
from registry.store.layout import Layout

__all__ = ["CHUNK", "ChunkHasher", "ChunkStore", "VerifiedFile"]

CHUNK = 1 << 20
MAGIC = b"adapter-chunks/1"
DIGEST = 32


class ChunkHasher:
    """sha256 of a file and the digests of its chunks, in one pass over pieces of any size."""

    def __init__(self) -> None:
        self.size = 0
        self._digests: list[bytes] = []
        self._whole, self._chunk = hashlib.sha256(), blake3()
        self._room = CHUNK

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        self._whole.update(data)
        view = memoryview(data)
        self.size += len(view)
        while view:
            part = view[: self._room]
            self._chunk.update(part)
            self._room -= len(part)
            view = view[len(part) :]
            if not self._room:
                self._end_chunk()

    def _end_chunk(self) -> None:
        self._digests.append(self._chunk.digest())
        self._chunk, self._room = blake3(), CHUNK

    @property
    def sha256(self) -> str:
        """Of all that came, 64 hex digits."""
        return self._whole.hexdigest()

    def digests(self) -> tuple[bytes, ...]:
        """One a chunk; the last one may be short. Nothing may come after."""
        if self._room < CHUNK:
            self._end_chunk()
        return tuple(self._digests)


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """A file of which only bytes come out that are what was stored. `digests`: BLAKE3, one a chunk."""

    path: Path
    size: int
    digests: Sequence[bytes]

    def read_at(self, start: int, count: int) -> bytes:
        """At most `count` bytes from `start` on, fewer at the end. Raises BlobCorruptError."""
        stop = min(start + count, self.size)
        if start >= stop:
            return b""
        first = start // CHUNK
        pieces = [bytes(data) for data in self._chunks(first, -(-stop // CHUNK))]
        return b"".join(pieces)[start - first * CHUNK : stop - first * CHUNK]

    def verify(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Read all of it; `advance` is called with the bytes of each chunk. Raises BlobCorruptError."""
        for data in self._chunks(0, len(self.digests)):
            advance(len(data))

    def damaged_ranges(self, advance: Callable[[int], None] = lambda count: None) -> list[tuple[int, int]]:
        """(start, stop) of all bytes that are in damaged chunks, neighbours joined."""
        found: list[tuple[int, int]] = []
        for index, data in self._read(0, len(self.digests)):
            advance(len(data))
            if self._is_whole(index, data):
                continue
            start, stop = index * CHUNK, min((index + 1) * CHUNK, self.size)
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, stop))
        return found

    def _chunks(self, first: int, last: int) -> Iterator[memoryview]:
        for index, data in self._read(first, last):
            if not self._is_whole(index, data):
                begin = index * CHUNK
                raise damaged(
                    self.path, f"bytes {begin} to {begin + self._length(index) - 1} as they were stored", "others"
                )
            yield data

    def _is_whole(self, index: int, data: memoryview) -> bool:
        return len(data) == self._length(index) and blake3(data).digest() == self.digests[index]

    def _length(self, index: int) -> int:
        return min(CHUNK, self.size - index * CHUNK)

    def _read(self, first: int, last: int) -> Iterator[tuple[int, memoryview]]:
        """Chunks of the file by their index, each valid until the next one is asked for: fresh memory costs."""
        buffer = memoryview(bytearray(min(CHUNK, self.size)))
        with storage_errors(f"reading {self.path.name}"), self.path.open("rb", buffering=0) as file:
            file.seek(first * CHUNK)
            for index in range(first, last):
                view, got = buffer[: self._length(index)], 0
                while got < len(view) and (count := file.readinto(view[got:])):
                    got += count
                yield index, view[:got]


class ChunkStore:
    """Lists of digests by the sha256 of their files."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def reader(self, path: Path, sha256: str) -> VerifiedFile:
        """`path` for reading, as the file of that sha256. Raises BlobCorruptError where all of it had to be hashed."""
        try:
            size = path.stat().st_size
        except OSError:
            raise damaged(path, f"sha256 {sha256}", "a missing file") from None
        known = self._load(sha256) if size > CHUNK else None
        if known is None:
            found, known = self.measure(path)
            if found != sha256:
                raise damaged(path, f"sha256 {sha256}", found)
        if known.size != size:
            raise damaged(path, f"{known.size} bytes", f"{size} bytes")
        return VerifiedFile(path, known.size, known.digests)

    def verify(self, path: Path, sha256: str, advance: Callable[[int], None] = lambda count: None) -> None:
        """Read all of `path`, which must be the file of that sha256. Raises BlobCorruptError."""
        self.reader(path, sha256).verify(advance)

    def measure(self, path: Path, advance: Callable[[int], None] = lambda count: None) -> tuple[str, VerifiedFile]:
        """The sha256 of a file, and its reader; the list of its chunks is kept."""
        hasher, buffer = ChunkHasher(), memoryview(bytearray(CHUNK))
        with storage_errors(f"reading {path.name}"), path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hasher.update(buffer[:count])
                advance(count)
        self.keep(hasher)
        return hasher.sha256, VerifiedFile(path, hasher.size, hasher.digests())

    def keep(self, hasher: ChunkHasher) -> None:
        """Keep the list of a file that was hashed; one that cannot be written is made again when it is needed."""
        if hasher.size <= CHUNK:
            return
        body = MAGIC + struct.pack("<Q", hasher.size) + b"".join(hasher.digests())
        place = self._layout.chunk_list(hasher.sha256)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            self._layout.incoming.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=self._layout.incoming)
            with os.fdopen(handle, "wb") as file:
                file.write(body + blake3(body).digest())
            os.replace(aside, place)
        except OSError:  # a store that is read-only or full can still be read
            return

    def is_whole(self, sha256: str) -> bool:
        """Whether the list that is kept for that file is as it was written."""
        return self._load(sha256) is not None

    def _load(self, sha256: str) -> VerifiedFile | None:
        """What a list says; None where there is none or it is damaged."""
        place = self._layout.chunk_list(sha256)
        try:
            data = place.read_bytes()
        except OSError:
            return None
        body, head = data[:-DIGEST], len(MAGIC) + 8
        if data[: len(MAGIC)] != MAGIC or len(body) < head or blake3(body).digest() != data[-DIGEST:]:
            return None
        (size,) = struct.unpack("<Q", body[len(MAGIC) : head])
        digests = tuple(body[at : at + DIGEST] for at in range(head, len(body), DIGEST))
        return VerifiedFile(place, size, digests)


def damaged(path: Path, expected: str, found: str) -> BlobCorruptError:
    """The failure of a stored file that is not what it was."""
    return BlobCorruptError(
        f"the stored file {path.name[:40]} is damaged",
        expected=expected,
        found=found,
        remedy="see 'registry verify --all'; 'registry doctor --repair' restores what another copy is left of",
        path=path,
    )

"""Shards: what a Xet client says of the files that it uploaded, and how they become blobs.

    header   48 bytes
    file     hash 32, flags u32, segments u32, 8 unused
             each segment: xorb 32, flags u32, bytes u32, first chunk u32, chunk after the last u32
             with flag 31: as many entries again, 48 bytes each, that only verify
             with flag 30: sha256 of the file 32, 16 unused
    …        until 32 bytes of 0xff

Sources: the format as https://huggingface.co/docs/xet describes it.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from composer.errors import CorruptFileError, UsageError
from composer.sinks import storage_errors
from registry.store.local import LocalStore
from registry.store.xorbs import Piece, XorbStore, hash_text

__all__ = ["MAX_SHARD", "ShardFile", "assemble", "read_shard", "release"]

MAX_SHARD = 64 << 20
ENTRY = 48
END = b"\xff" * 32


@dataclass(frozen=True, slots=True)
class Segment:
    """Chunks `start` to `stop` of a xorb, which are `size` bytes."""

    xorb: str
    size: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A file as a list of segments."""

    sha256: str
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return sum(segment.size for segment in self.segments)


def read_shard(data: bytes) -> list[ShardFile]:
    """The files of a shard. Raises CorruptFileError for one that cannot be read or names a file without sha256."""
    files, at = [], ENTRY
    try:
        while data[at : at + 32] != END:
            flags, count = struct.unpack_from("<II", data, at + 32)
            at += ENTRY
            if at + count * ENTRY > len(data):
                raise CorruptFileError("a shard is cut short", expected=at + count * ENTRY, found=len(data))
            segments = []
            for _ in range(count):
                size, start, stop = struct.unpack_from("<III", data, at + 36)
                segments.append(Segment(hash_text(data[at : at + 32]), size, start, stop))
                at += ENTRY
            at += count * ENTRY if flags >> 31 else 0
            sha256 = hash_text(data[at : at + 32]) if flags >> 30 & 1 else ""
            at += ENTRY if flags >> 30 & 1 else 0
            if len(sha256) != 64:
                raise CorruptFileError("a shard names a file without its sha256", expected="flag 30", found=flags)
            files.append(ShardFile(sha256, tuple(segments)))
    except struct.error as error:
        raise CorruptFileError(
            f"a shard is cut short: {error}", expected="files up to a mark", found=len(data)
        ) from None
    return files


def assemble(file: ShardFile, xorbs: XorbStore, store: LocalStore, limit: int) -> None:
    """Make a file's blob. One that is there already is made and checked all the same: a sender must have the bytes.

    Raises CorruptFileError when its bytes are not those that the shard states, NotFoundError when a xorb is missing.
    """
    if file.size > limit:
        raise UsageError("the file is too large", expected=f"at most {limit} bytes", found=file.size)
    with storage_errors("storing an upload"), store.receive(file.sha256) as writer:
        for segment in file.segments:
            size = 0
            for chunk in xorbs.chunks(segment.xorb, segment.start, segment.stop):
                writer.write(chunk)
                size += len(chunk)
            if size != segment.size:
                raise CorruptFileError(
                    "a segment has another size than its shard states", expected=segment.size, found=size
                )


def release(files: Sequence[ShardFile], xorbs: XorbStore) -> None:
    """Drop the xorbs whose chunks all lie in the blobs of `files`, which are there."""
    pieces: defaultdict[str, list[Piece]] = defaultdict(list)
    for file in files:
        offset = 0
        for segment in file.segments:
            pieces[segment.xorb].append(Piece(segment.start, segment.stop, file.sha256, offset))
            offset += segment.size
    for name, found in pieces.items():
        xorbs.release(name, found)

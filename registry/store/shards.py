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

import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from composer.errors import CorruptFileError, NotFoundError, UsageError
from composer.sinks import storage_errors
from registry.store.layout import Layout
from registry.store.local import LocalStore
from registry.store.xorbs import XorbStore, hash_bytes, hash_text, xorb_chunk

__all__ = [
    "MAX_SHARD",
    "ShardFile",
    "assemble",
    "keep_shard",
    "read_kept_shard",
    "read_shard",
    "rebuild_xorb",
    "write_shard",
]

MAX_SHARD = 64 << 20
ENTRY = 48
END = b"\xff" * 32
WITH_SHA256 = 1 << 30


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


def write_shard(file: ShardFile) -> bytes:
    """A shard of one file, as `read_shard` reads it."""
    head = bytes(32) + struct.pack("<II", WITH_SHA256, len(file.segments)) + bytes(8)
    entries = [
        hash_bytes(segment.xorb) + struct.pack("<IIII", 0, segment.size, segment.start, segment.stop)
        for segment in file.segments
    ]
    return bytes(ENTRY) + head + b"".join(entries) + hash_bytes(file.sha256) + bytes(16) + END


def keep_shard(layout: Layout, file: ShardFile) -> None:
    """Remember which chunks a file came by, so that it and its xorbs can be restored from each other."""
    place = layout.shards / file.sha256[:2] / file.sha256
    if place.is_file():
        return
    with storage_errors("keeping a shard"):
        place.parent.mkdir(parents=True, exist_ok=True)
        layout.incoming.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=layout.incoming, delete=False) as out:
            out.write(write_shard(file))
        os.replace(out.name, place)


def read_kept_shard(layout: Layout, sha256: str) -> ShardFile | None:
    """What is remembered of a file; None where that is nothing, or damaged."""
    try:
        (file,) = read_shard((layout.shards / sha256[:2] / sha256).read_bytes())
    except (OSError, ValueError, CorruptFileError):
        return None
    return file if file.sha256 == sha256 else None


def rebuild_xorb(name: str, xorbs: XorbStore, store: LocalStore, layout: Layout) -> bool:
    """Make a damaged xorb anew from the files that came by it; False where these do not have all of its chunks.

    The lengths of chunks come from the damaged xorb, and the hash of the new one is checked before it is kept.
    """
    try:
        lengths = xorbs.lengths(name)
        chunks = dict(_chunks_of_files(name, lengths, store, layout))
        with xorbs.receive(name) as out:
            for index in range(len(lengths)):
                out.write(xorb_chunk(chunks[index]))
    except (CorruptFileError, NotFoundError, KeyError):
        return False
    return True


def _chunks_of_files(
    name: str, lengths: Sequence[int], store: LocalStore, layout: Layout
) -> Iterator[tuple[int, bytes]]:
    """Chunks of a xorb by their index, cut out of whole files that have them."""
    for place in layout.shards.glob("??/*"):
        file = read_kept_shard(layout, place.name)
        if file is None or not any(segment.xorb == name for segment in file.segments):
            continue
        if not store.keep_whole(file.sha256):
            continue
        at = 0
        with store.path(file.sha256).open("rb") as source:
            for segment in file.segments:
                if segment.xorb == name:
                    source.seek(at)
                    for index in range(segment.start, min(segment.stop, len(lengths))):
                        yield index, source.read(lengths[index])
                at += segment.size


def assemble(file: ShardFile, xorbs: XorbStore, store: LocalStore, limit: int) -> None:
    """Make a file's blob, unless it is there.

    Raises CorruptFileError when its bytes are not those that the shard states, NotFoundError when a xorb is missing.
    """
    if store.keep_whole(file.sha256):
        return
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

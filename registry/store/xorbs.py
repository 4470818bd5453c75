"""Xorbs: the unit in which Xet clients upload. A file arrives as ranges of chunks of xorbs and becomes a plain blob.

    xorb    chunks, each: version u8, stored length u24, scheme u8, length u24, bytes      then an optional footer
    scheme  0 as it is   1 an LZ4 frame   2 an LZ4 frame of the bytes dealt out by their index modulo 4
    hash    root of a Merkle tree over BLAKE3 of the chunks, checked before a xorb is kept

    store/xorbs/ab/abcd…           as it was uploaded
    store/xorbs/ab/abcd….places    where its chunks lie in blobs, once they all do: the same bytes are not kept twice

Clients remember what they sent and do not send it again, so a xorb goes on being one while its blobs are there.

Sources: the format and the hash as https://huggingface.co/docs/xet describes them.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import lz4.frame
import numpy as np
from blake3 import blake3

from composer.errors import CorruptFileError, NotFoundError, UsageError
from composer.sinks import fsync_folder, make_folder, storage_errors
from registry.store.layout import Layout

__all__ = ["MAX_XORB", "Piece", "XorbStore", "collect_places", "hash_text", "missing_xorb", "xorb_hash"]

MAX_XORB = 72 << 20  # 64 MiB of chunks, their headers and the footer
MAX_CHUNK = 1 << 20
HASH = re.compile(r"[0-9a-f]{64}")
FOOTER = b"XETBLOB"
HEADER = 8
LEAF_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
MEAN_CHILDREN = 4


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Where a chunk lies in its xorb, and how."""

    offset: int
    stored: int
    scheme: int
    length: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Chunks `start` to `stop` of a xorb lie one after another in a blob, from `offset` on."""

    start: int
    stop: int
    sha256: str
    offset: int


class XorbStore:
    """Xorbs by their hash."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    @contextmanager
    def receive(self, name: str) -> Iterator[BinaryIO]:
        """A file to write the xorb `name` to; it is kept when the context ends and its chunks have that hash.

        Raises UsageError for a name that is no hash, CorruptFileError for bytes that are no xorb or another.
        """
        place = self._place(name)
        with storage_errors("storing a xorb"):
            self._layout.incoming.mkdir(parents=True, exist_ok=True)
            descriptor, text = tempfile.mkstemp(dir=self._layout.incoming)
            aside = Path(text)
            try:
                with os.fdopen(descriptor, "w+b") as file:
                    yield file
                    file.flush()
                    found = xorb_hash(file)
                    os.fsync(descriptor)
                if found != name:
                    raise CorruptFileError("the chunks are not those of the xorb", expected=name, found=found)
                if self._placed(name):
                    return
                make_folder(place.parent)
                os.replace(aside, place)
                fsync_folder(place.parent)
            finally:
                aside.unlink(missing_ok=True)

    def chunks(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of chunks `start` to `stop` of a xorb. Raises NotFoundError where it is not here."""
        place = self._place(name)
        if not place.is_file():
            yield from self._from_blobs(name, start, stop)
            return
        with place.open("rb") as file:
            index = list(_index(file))
            _check_range(name, start, stop, len(index))
            for chunk in index[start:stop]:
                yield _read(file, chunk)

    def release(self, name: str, pieces: Sequence[Piece]) -> None:
        """Drop a xorb all of whose chunks lie in blobs, and keep where; one that is covered in part stays."""
        place = self._place(name)
        if not place.is_file():
            return
        with place.open("rb") as file:
            lengths = [chunk.length for chunk in _index(file)]
        places: list[tuple[str, int, int] | None] = [None] * len(lengths)
        for piece in pieces:
            offset = piece.offset
            for number in range(piece.start, piece.stop):
                places[number] = (piece.sha256, offset, lengths[number])
                offset += lengths[number]
        if None in places:
            return
        with storage_errors("noting where the chunks of a xorb lie"):
            self._layout.incoming.mkdir(parents=True, exist_ok=True)
            descriptor, aside = tempfile.mkstemp(dir=self._layout.incoming)
            with os.fdopen(descriptor, "w") as file:
                json.dump(places, file, separators=(",", ":"))
                file.flush()
                os.fsync(descriptor)
            os.replace(aside, self._layout.xorb_places(name))
            place.unlink()
            fsync_folder(place.parent)

    def is_whole(self, name: str) -> bool:
        """Whether the chunks of a xorb that is here, as it is or in blobs, are those that it is named after."""
        try:
            if self._place(name).is_file():
                with self._place(name).open("rb") as file:
                    return xorb_hash(file) == name
            count = len(_read_places(self._layout.xorb_places(name)))
            return _root(self._from_blobs(name, 0, count)) == name
        except (CorruptFileError, NotFoundError):
            return False

    def _placed(self, name: str) -> bool:
        """Whether the chunks of a xorb are known to lie in blobs, and these are there."""
        place = self._layout.xorb_places(name)
        places = _read_places(place)
        return bool(places) and all(self._layout.blob(sha256).is_file() for sha256, _, _ in places)

    def _from_blobs(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        if not self._placed(name):
            raise missing_xorb(name)
        places = _read_places(self._layout.xorb_places(name))
        _check_range(name, start, stop, len(places))
        for sha256, offset, length in places[start:stop]:
            with self._layout.blob(sha256).open("rb") as file:
                file.seek(offset)
                yield file.read(length)

    def _place(self, name: str) -> Path:
        if not HASH.fullmatch(name):
            raise UsageError(f"{name!r} is not the hash of a xorb", expected="64 hex digits", found=name)
        return self._layout.xorb(name)


def missing_xorb(name: str) -> NotFoundError:
    """The failure of a xorb that is not here, or that somebody else sent."""
    return NotFoundError(
        f"the xorb {name[:12]} is not here",
        expected="xorbs before the shard that names them",
        found=name,
        remedy="remove the client's Xet cache (HF_XET_CACHE) and push again",
    )


def collect_places(layout: Layout, before: float) -> int:
    """Remove what says where chunks lie in blobs that are gone; returns how many bytes."""
    removed = 0
    for place in layout.xorbs.glob("??/*.places"):
        stat = place.stat()
        blobs = {sha256 for sha256, _, _ in _read_places(place)}
        if stat.st_mtime < before and not (blobs and all(layout.blob(sha256).is_file() for sha256 in blobs)):
            place.unlink()
            removed += stat.st_size
    return removed


def _read_places(place: Path) -> list[tuple[str, int, int]]:
    """Where the chunks of a xorb lie: blob, offset, length. Nothing where it is not known, or damaged."""
    try:
        entries = json.loads(place.read_bytes())
        found = [(sha256, offset, length) for sha256, offset, length in entries]
    except (FileNotFoundError, ValueError, TypeError):
        return []
    is_place = all(
        HASH.fullmatch(str(sha256)) and type(offset) is int is type(length) and min(offset, length) >= 0
        for sha256, offset, length in found
    )
    return found if is_place and all(length <= MAX_CHUNK for _, _, length in found) else []


def _check_range(name: str, start: int, stop: int, count: int) -> None:
    if not 0 <= start < stop <= count:
        raise CorruptFileError(f"the xorb {name[:12]} has {count} chunks", found=[start, stop])


def _index(file: BinaryIO) -> Iterator[_Chunk]:
    """The chunks of a xorb, from their headers. Raises CorruptFileError."""
    size, offset = file.seek(0, os.SEEK_END), 0
    while offset < size:
        file.seek(offset)
        header = file.read(HEADER)
        if header.startswith(FOOTER):
            return
        chunk = _Chunk(
            offset + HEADER,
            int.from_bytes(header[1:4], "little"),
            header[4] if len(header) == HEADER else 0,
            int.from_bytes(header[5:8], "little"),
        )
        offset = chunk.offset + chunk.stored
        if len(header) < HEADER or header[0] or offset > size or not 0 < chunk.length <= MAX_CHUNK or chunk.scheme > 2:
            raise CorruptFileError("a xorb has a chunk that cannot be read", expected="chunks", found=header.hex())
        yield chunk


def _read(file: BinaryIO, chunk: _Chunk) -> bytes:
    """The bytes of one chunk, decompressed to the length that it states and no further."""
    file.seek(chunk.offset)
    data = file.read(chunk.stored)
    if chunk.scheme:
        try:
            data = lz4.frame.LZ4FrameDecompressor().decompress(data, max_length=chunk.length + 1)
        except RuntimeError as error:
            raise CorruptFileError(f"a chunk cannot be decompressed: {error}") from None
    if len(data) != chunk.length:
        raise CorruptFileError("a chunk has another length than it states", expected=chunk.length, found=len(data))
    return _gathered(data) if chunk.scheme == 2 else data


def _gathered(data: bytes) -> bytes:
    """Bytes in their order, from four runs: those whose index modulo 4 is 0, 1, 2 and 3."""
    source, out = np.frombuffer(data, np.uint8), np.empty(len(data), np.uint8)
    begin = 0
    for phase in range(4):
        count = len(out[phase::4])
        out[phase::4] = source[begin : begin + count]
        begin += count
    return out.tobytes()


def xorb_hash(file: BinaryIO) -> str:
    """The hash of the xorb in `file`."""
    return _root(_read(file, chunk) for chunk in _index(file))


def _root(chunks: Iterable[bytes]) -> str:
    nodes = [(blake3(data, key=LEAF_KEY).digest(), len(data)) for data in chunks]
    if not nodes:
        raise CorruptFileError("a xorb without chunks", expected="chunks", found="none")
    while len(nodes) > 1:
        nodes = list(_parents(nodes))
    return hash_text(nodes[0][0])


def _parents(nodes: Sequence[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """One level up. A group ends after 3 to 9 nodes, at one whose hash is a multiple of 4, or with the last."""
    begin = 0
    while begin < len(nodes):
        end = min(begin + 2 * MEAN_CHILDREN + 1, len(nodes))
        for index in range(begin + 2, end):
            if int.from_bytes(nodes[index][0][24:], "little") % MEAN_CHILDREN == 0:
                end = index + 1
                break
        group = nodes[begin:end]
        text = "".join(f"{hash_text(digest)} : {size}\n" for digest, size in group)
        yield blake3(text.encode(), key=NODE_KEY).digest(), sum(size for _, size in group)
        begin = end


def hash_text(digest: bytes) -> str:
    """A hash as clients write it: four little-endian numbers of 64 bits in hex."""
    return "".join(digest[begin : begin + 8][::-1].hex() for begin in range(0, 32, 8))

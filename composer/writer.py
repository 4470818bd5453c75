"""Writing one large file: filled in place by several threads, hashed on the way, past the page cache.

reserve(n)      a Room: memory for the next n bytes of the file; any thread fills it
append(room)    in the order of the file: hashed by one thread, written by others, the memory used again
write(data)     both at once, for bytes that lie elsewhere; small ones share a room

file      ···|page|page|page|page|page|···        direct writes are of whole pages
rooms     ···───┤├──────────────┤├─────···        a room may begin and end anywhere:
                └ the rest of a page goes to the front of the next room's memory
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["ROOM_BYTES", "HashingWriter", "Room", "Staging"]

ROOM_BYTES = 4 << 20  # the most that one room holds
PAGE = 4096
WRITERS = 2  # a disk takes two requests at a time faster than one


@dataclass(frozen=True, slots=True)
class Room:
    """Memory for `view`, the bytes of the file from `offset` on; `buffer` begins with the page that holds `offset`."""

    offset: int
    view: memoryview
    buffer: mmap.mmap

    def __len__(self) -> int:
        return len(self.view)


class Staging:
    """The memory and the writing threads that the files of one sink share.

    At most `rooms` buffers of ROOM_BYTES and two pages exist: the caller may have all but one of them reserved and not
    yet appended.
    """

    def __init__(self, rooms: int = 4) -> None:
        self._rooms, self._made = rooms, 0
        self._used: deque[tuple[mmap.mmap, list[Future[None]]]] = deque()
        self.pool = ThreadPoolExecutor(WRITERS)

    def take(self) -> mmap.mmap:
        """A free buffer; waits for the oldest one that is being written. Raises what went wrong in writing it."""
        ready = bool(self._used) and all(future.done() for future in self._used[0][1])
        if not ready and self._made < self._rooms:
            self._made += 1
            return mmap.mmap(-1, ROOM_BYTES + 2 * PAGE)
        buffer, futures = self._used.popleft()
        for future in futures:
            future.result()
        return buffer

    def give(self, buffer: mmap.mmap, futures: list[Future[None]]) -> None:
        """Hand a buffer back, free once the futures are done."""
        self._used.append((buffer, futures))

    def close(self) -> None:
        """End the threads; what they were given is written first."""
        self.pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HashingWriter:
    """A file that knows its size and sha256 as it grows, and is fsynced on close.

    Whole pages are written past the page cache (O_DIRECT) where the file system has that, so that copying into the
    cache and writing back from it cost nothing and little is left for the fsync. Raises OSError of any earlier write.
    """

    def __init__(self, path: Path, staging: Staging | None = None) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._direct_descriptor = _open_direct(path)
        self._direct = self._direct_descriptor is not None
        self._path, self._own = path, staging is None
        self._staging = Staging(2) if staging is None else staging
        self._hash, self._hasher = hashlib.sha256(), ThreadPoolExecutor(1)
        self._pending: list[Future[None]] = []
        self._tail = b""  # what has been appended of a page that is not whole yet
        self._shared: Room | None = None  # the room that `write` fills, and how many bytes of it are
        self._filled = 0
        self._reserved = 0
        self.size = 0

    def reserve(self, size: int) -> Room:
        """Memory for the next `size` bytes, at most ROOM_BYTES; to be given to `append` in the order of reservation."""
        return self._room(self.hold(size), size)

    def hold(self, size: int) -> int:
        """Keep the next `size` bytes free, for a `write` of as many when their turn comes. Returns where they begin."""
        self._flush()
        offset = self._reserved
        self._reserved += size
        return offset

    def append(self, room: Room) -> None:
        """Write what `room` was filled with."""
        if room.offset != self.size:
            raise RuntimeError(f"{self._path.name}: bytes of {room.offset} are appended at {self.size}")
        lead = len(self._tail)
        room.buffer[:lead] = self._tail
        end = lead + len(room)
        whole = end - end % PAGE
        self._tail = room.buffer[whole:end]
        futures = [self._hasher.submit(self._hash.update, room.view)]
        if whole:
            pages = memoryview(room.buffer)[:whole]
            futures.append(self._staging.pool.submit(self._put, pages, room.offset - lead))
        self.size += len(room)
        self._pending = [future for future in self._pending if not future.done() or future.exception()] + futures
        self._staging.give(room.buffer, futures)

    def write(self, data: bytes | bytearray | memoryview, held: int | None = None) -> None:
        """Append all of `data`, at the place that `hold` gave; it may be used again on return."""
        view = memoryview(data).cast("B")
        if held is not None:
            for begin in range(0, len(view), ROOM_BYTES):
                piece = view[begin : begin + ROOM_BYTES]
                room = self._room(held + begin, len(piece))
                room.view[:] = piece
                self.append(room)
            return
        while view:
            if self._shared is None:
                self._shared = self._room(self._reserved, ROOM_BYTES)
            count = min(len(view), ROOM_BYTES - self._filled)
            self._shared.view[self._filled : self._filled + count] = view[:count]
            self._filled += count
            self._reserved += count
            view = view[count:]
            if self._filled == ROOM_BYTES:
                self._flush()

    def _flush(self) -> None:
        """Append what `write` has gathered."""
        if self._shared is not None:
            room, count = self._shared, self._filled
            self._shared, self._filled = None, 0
            self.append(Room(room.offset, room.view[:count], room.buffer))

    def _room(self, offset: int, size: int) -> Room:
        buffer, lead = self._staging.take(), offset % PAGE
        return Room(offset, memoryview(buffer)[lead : lead + size], buffer)

    def _put(self, pages: memoryview, offset: int) -> None:
        while pages:
            direct = self._direct
            descriptor = self._direct_descriptor if direct else self._descriptor
            assert descriptor is not None
            try:
                written = os.pwrite(descriptor, pages, offset)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:  # a disk with larger blocks
                    self._direct = False
                    continue
                error.filename = str(self._path)
                raise
            if written % PAGE:  # what is left of a short write is no whole page
                self._direct = False
            pages, offset = pages[written:], offset + written

    @property
    def sha256(self) -> str:
        """Of all that was written, 64 hex digits; once the file is closed."""
        return self._hash.hexdigest()

    def finish(self) -> None:
        """Wait until everything is on the disk, and close. Raises OSError of any write."""
        try:
            self._flush()
            for future in self._pending:
                future.result()
            self._direct = False
            self._put(memoryview(self._tail), self.size - len(self._tail))
            os.fsync(self._descriptor)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close a file that need not be whole."""
        self._hasher.shutdown()
        for future in self._pending:
            future.exception()
        if self._own:
            self._staging.close()
        os.close(self._descriptor)
        if self._direct_descriptor is not None:
            os.close(self._direct_descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()


def _open_direct(path: Path) -> int | None:
    """The file once more, for writes past the page cache; None where the platform or the file system has none."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except (AttributeError, OSError):
        return None

"""Writers that end in commit() or cancel(): a result is visible whole or not at all.

parent/.OUT.<random>.part/     everything is written here
parent/OUT                     appears by one rename, after every file and folder is fsynced
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from composer.errors import ConflictError, StorageError

__all__ = ["STAGING_BYTES", "FolderSink", "HashingWriter", "fsync_folder", "storage_errors"]

STAGING_BYTES, STAGING_BUFFERS = 4 << 20, 4  # of one file being written


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an OSError of the disk into a StorageError that says what was being done."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free some space or choose another folder",
            errno.EDQUOT: "free some space or choose another folder",
            errno.EFBIG: "raise the file size limit (ulimit -f) or choose another folder",
            errno.EROFS: "choose a folder that can be written",
            errno.EACCES: "choose a folder that can be written",
            errno.EPERM: "choose a folder that can be written",
        }
        raise StorageError(
            f"{doing} failed: {error.strerror or error}",
            expected="a disk that takes the bytes",
            found=errno.errorcode.get(error.errno or 0, str(error.errno)),
            remedy=remedies.get(error.errno or 0, "check the disk"),
            path=error.filename,
        ) from error


def fsync_folder(path: Path) -> None:
    """Make a rename in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class HashingWriter:
    """A file that knows its size and sha256 as it grows, and is fsynced on close.

    What is written is gathered in page-aligned buffers. A full one is hashed in one thread while another writes it past
    the page cache (O_DIRECT, where the file system has it), so that copying into the cache and writing back from it
    cost nothing and little is left for the fsync.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._path, self._direct = path, False
        self._hash = hashlib.sha256()
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._free: deque[tuple[mmap.mmap, list[Future[None]]]] = deque()
        self._buffer, self._filled = mmap.mmap(-1, STAGING_BYTES), 0
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of `data`; it may be reused on return. Raises OSError of this or of an earlier write."""
        view = memoryview(data).cast("B")
        for begin, room in self._rooms(len(view)):
            room[:] = view[begin : begin + len(room)]

    def write_from(self, read_into: Callable[[int, memoryview], None], start: int, stop: int) -> None:
        """Append what `read_into(position, buffer)` fills buffers with, for the positions from `start` to `stop`."""
        for begin, room in self._rooms(stop - start):
            read_into(start + begin, room)

    def _rooms(self, count: int) -> Iterator[tuple[int, memoryview]]:
        """Pieces of the buffers for the next `count` bytes, each with how many went before; the caller fills them."""
        begin = 0
        while begin < count:
            size = min(count - begin, STAGING_BYTES - self._filled)
            yield begin, memoryview(self._buffer)[self._filled : self._filled + size]
            begin += size
            self._filled += size
            self.size += size
            if self._filled == STAGING_BYTES:
                self._pass_on()
                self._buffer = self._next_buffer()

    def _pass_on(self) -> None:
        """Have the buffer hashed and written."""
        view, offset = memoryview(self._buffer)[: self._filled], self.size - self._filled
        direct = self._filled == STAGING_BYTES
        futures = [self._hasher.submit(self._hash.update, view), self._writer.submit(self._put, view, offset, direct)]
        self._free.append((self._buffer, futures))
        self._filled = 0

    def _next_buffer(self) -> mmap.mmap:
        if len(self._free) < STAGING_BUFFERS - 1:
            return mmap.mmap(-1, STAGING_BYTES)
        buffer, futures = self._free.popleft()
        for future in futures:
            future.result()
        return buffer

    def _put(self, view: memoryview, offset: int, direct: bool) -> None:
        if direct != self._direct:
            self._direct = direct and _set_direct(self._descriptor, True)
            if not direct:
                _set_direct(self._descriptor, False)
        while view:
            try:
                written = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    error.filename = str(self._path)
                    raise
                _set_direct(self._descriptor, False)  # a disk with larger blocks, or what a short write left
                self._direct = False
                continue
            view, offset = view[written:], offset + written

    @property
    def sha256(self) -> str:
        """Of all that was written, 64 hex digits; once the file is closed."""
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._pass_on()
                for future in [future for _, futures in self._free for future in futures]:
                    future.result()
                os.fsync(self._descriptor)
        finally:
            self._hasher.shutdown()
            self._writer.shutdown()
            os.close(self._descriptor)


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Whether writes now bypass the page cache; not every file system and platform can."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | flag if wanted else flags & ~flag)
    except OSError:
        return False
    return wanted


class FolderSink:
    """A folder that appears at `out` on commit.

    Raises ConflictError when `out` exists and `replace` is false; StorageError when the disk fails.
    """

    def __init__(self, out: Path, *, replace: bool = False) -> None:
        if out.exists() and not replace:
            raise ConflictError(
                f"{out} already exists",
                expected="a new folder",
                found="an existing file or folder",
                remedy="choose another --out, or give --force to replace it",
                path=out,
            )
        if out.exists() and not (out / "composition.json").is_file():
            raise ConflictError(
                f"{out} is not a composed model: it is not replaced",
                expected="a folder with composition.json",
                found="something else",
                remedy="choose another --out",
                path=out,
            )
        self.out = out
        self.files: dict[str, dict[str, int | str]] = {}
        with storage_errors(f"creating a folder beside {out}"):
            out.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))

    @contextmanager
    def open(self, name: str) -> Iterator[HashingWriter]:
        """Write one file."""
        with storage_errors(f"writing {name}"), HashingWriter(self.folder / name) as writer:
            yield writer
        self.files[name] = {"sha256": writer.sha256, "size": writer.size}

    def write(self, name: str, data: bytes) -> None:
        """Write one small file whole."""
        with self.open(name) as writer:
            writer.write(data)

    def adopt(self, name: str) -> None:
        """Take a file that something else wrote into `folder` into the manifest."""
        from composer.files import sha256_file

        with storage_errors(f"reading {name}"):
            path = self.folder / name
            with path.open("rb") as file:
                os.fsync(file.fileno())
            self.files[name] = {"sha256": sha256_file(path), "size": path.stat().st_size}

    def commit(self) -> None:
        """Make the folder durable and visible."""
        with storage_errors(f"publishing {self.out}"):
            self.folder.chmod(0o755)
            fsync_folder(self.folder)
            if self.out.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".old", dir=self.out.parent))
                os.rename(self.out, old / "replaced")
                os.rename(self.folder, self.out)
                fsync_folder(self.out.parent)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(self.folder, self.out)
                fsync_folder(self.out.parent)

    def cancel(self) -> None:
        """Remove all that was written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder.exists():
            self.cancel()

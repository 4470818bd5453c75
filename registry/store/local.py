"""The blob store on a local disk: written aside, fsynced, renamed; a blob is never changed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from composer.errors import CorruptFileError
from composer.sinks import fsync_folder, make_folder, storage_errors
from composer.writer import ROOM_BYTES, HashingWriter
from registry.errors import BlobCorruptError
from registry.store.chunks import ChunkStore, damaged
from registry.store.layout import Layout

__all__ = ["LocalStore"]


def _touch(place: Path) -> bool:
    """Whether it is there; then a collection leaves it alone for its grace period."""
    try:
        os.utime(place)
    except FileNotFoundError:
        return False
    return True


class LocalStore:
    """Blobs by sha256."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.chunks = ChunkStore(layout)

    def put(self, source: Path, advance: Callable[[int], None] = lambda count: None) -> tuple[str, int]:
        """Store a copy of `source`; returns (sha256, size). Storing the same bytes again is a no-op.

        advance: called with the bytes of each chunk. Raises StorageError; nothing is visible then.
        """
        if source.parent.parent == self._layout.blobs and self.keep(source.name):  # a blob of this store
            return source.name, self.path(source.name, verify=True).stat().st_size
        with storage_errors(f"storing {source.name}"), self.receive() as writer, source.open("rb") as file:
            while chunk := file.read(ROOM_BYTES):
                writer.write(chunk)
                advance(len(chunk))
        return writer.sha256, writer.size

    @contextmanager
    def receive(self, expected: str | None = None) -> Iterator[HashingWriter]:
        """A writer whose bytes become a blob when the context ends without an exception, and vanish otherwise.

        Where a blob of them is there and damaged, they take its place.
        expected: the sha256 that they must have. Raises CorruptFileError when they have another, StorageError when the
        disk fails.
        """
        with storage_errors("storing a file"):
            self._layout.incoming.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self._layout.incoming))
            aside = folder / "blob"
            try:
                with HashingWriter(aside) as writer:
                    yield writer
                if expected is not None and writer.sha256 != expected:
                    raise CorruptFileError(
                        "the bytes that arrived are not those that were announced",
                        expected=f"sha256 {expected}",
                        found=writer.sha256,
                        remedy="send the file again",
                    )
                place = self._layout.blob(writer.sha256)
                if not self.keep_whole(writer.sha256):
                    make_folder(place.parent)
                    aside.chmod(0o444)
                    os.replace(aside, place)
                fsync_folder(place.parent)  # also where another process has put it there just now
            finally:
                aside.unlink(missing_ok=True)
                folder.rmdir()

    def holds(self, sha256: str) -> bool:
        """Whether there is a blob of that digest."""
        return self._layout.blob(sha256).is_file()

    def keep(self, sha256: str) -> bool:
        """Whether there is a blob of that digest; if so, a collection leaves it alone for its grace period."""
        with storage_errors("keeping a stored file"):
            return _touch(self._layout.blob(sha256))

    def path(self, sha256: str, *, verify: bool = False) -> Path:
        """The file of a blob. Raises BlobCorruptError when it is missing or, with `verify`, altered."""
        place = self._layout.blob(sha256)
        if verify:
            self.chunks.verify(place, sha256)
        elif not place.is_file():
            raise damaged(place, f"sha256 {sha256}", "a missing file")
        return place

    def keep_whole(self, sha256: str) -> bool:
        """As `keep`, of a blob that has its bytes: all of it is read."""
        if not self.keep(sha256):
            return False
        try:
            self.path(sha256, verify=True)
        except BlobCorruptError:
            return False
        return True

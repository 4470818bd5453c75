"""The blob store on a local disk: written aside, fsynced, renamed; a blob is never changed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from composer.files import sha256_file
from composer.sinks import fsync_folder, storage_errors
from composer.writer import ROOM_BYTES, HashingWriter
from registry.errors import BlobCorruptError
from registry.store.layout import Layout

__all__ = ["LocalStore"]


class LocalStore:
    """Blobs by sha256."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def put(self, source: Path, advance: Callable[[int], None] = lambda count: None) -> tuple[str, int]:
        """Store a copy of `source`; returns (sha256, size). Storing the same bytes again is a no-op.

        advance: called with the bytes of each chunk. Raises StorageError; nothing is visible then.
        """
        with storage_errors(f"storing {source.name}"):
            self._layout.incoming.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self._layout.incoming))
            aside = folder / "blob"
            try:
                with HashingWriter(aside) as writer, source.open("rb") as file:
                    while chunk := file.read(ROOM_BYTES):
                        writer.write(chunk)
                        advance(len(chunk))
                place = self._layout.blob(writer.sha256)
                if not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    aside.chmod(0o444)
                    os.replace(aside, place)
                    fsync_folder(place.parent)
            finally:
                aside.unlink(missing_ok=True)
                folder.rmdir()
        return writer.sha256, writer.size

    def path(self, sha256: str, *, verify: bool = False) -> Path:
        """The file of a blob. Raises BlobCorruptError when it is missing or, with `verify`, altered."""
        place = self._layout.blob(sha256)
        found = "a missing file" if not place.is_file() else sha256_file(place) if verify else sha256
        if found != sha256:
            raise BlobCorruptError(
                f"the stored file {sha256[:12]}… is damaged",
                expected=f"sha256 {sha256}",
                found=found,
                remedy="restore the store from a backup, or publish the version again from its source",
                path=place,
            )
        return place

"""The files of a registered base, which stay where they lie: are they still what was fingerprinted? And links."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from composer.files import FileSet, sha256_file
from composer.sinks import fsync_tree, storage_errors
from registry.errors import BaseChangedError
from registry.models import BaseFileRow, BaseModelRow
from registry.store.layout import Layout

__all__ = ["link_files", "same_stat", "unchanged_files"]


def link_files(layout: Layout, files: FileSet) -> Path:
    """A new folder of the registry's own with links to `files` (on another file system copies): a place for a base."""
    folder = layout.uploads / uuid.uuid4().hex / "files"
    with storage_errors("making room for a base"):
        for name, path in files.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place)
            except OSError:  # another file system
                shutil.copyfile(path, place)
        fsync_tree(folder.parent)
    return folder


def same_stat(path: Path, file: BaseFileRow) -> bool:
    """Whether size and time are those of the registration."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (file.size, file.mtime_ns)


def unchanged_files(row: BaseModelRow, files: Sequence[BaseFileRow]) -> dict[str, Path]:
    """Those files of a base, by name. One whose time moved is hashed again.

    Raises BaseChangedError for one that differs.
    """
    folder = Path(row.location)
    paths = {file.name: folder / file.name for file in files}
    for file in files:
        path = paths[file.name]
        if same_stat(path, file):
            continue
        found = "a missing file" if not path.is_file() else sha256_file(path)
        if found != file.sha256:
            raise BaseChangedError(
                f"{file.name} of the base {row.name!r} is no longer what was registered",
                expected=f"sha256 {file.sha256}",
                found=found,
                remedy=f"restore {path}, or register the new weights under another name",
                path=path,
            )
    return paths

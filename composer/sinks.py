"""Writers that end in commit() or cancel(): a result is visible whole or not at all.

parent/.OUT.<random>.part/     everything is written here
parent/OUT                     appears by one rename, after every file and folder is fsynced; where it replaces an
                               older one, the two exchange their names in one step
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from composer.errors import ConflictError, StorageError
from composer.parts import begin_part, exchange
from composer.writer import HashingWriter, Staging

__all__ = ["FolderSink", "fsync_folder", "fsync_tree", "make_folder", "storage_errors", "write_file"]


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


def write_file(path: Path, data: bytes) -> None:
    """Write one small file whole: it appears, or takes the place of the one there, by a rename after an fsync."""
    aside = ""
    with storage_errors(f"writing {path}"):
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                aside = file.name
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(aside).chmod(0o644)
            os.replace(aside, path)
            fsync_folder(path.parent)
        finally:
            if aside:
                Path(aside).unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def fsync_tree(folder: Path) -> None:
    """Make a folder with all that lies in it durable; its name in the folder above too."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            fsync_folder(path)
    fsync_folder(folder)
    fsync_folder(folder.parent)


def _taken(out: Path) -> ConflictError:
    return ConflictError(
        f"{out} already exists",
        expected="a new folder",
        found="an existing file or folder",
        remedy="choose another --out, or give --force to replace it",
        path=out,
    )


class FolderSink:
    """A folder that appears at `out` on commit.

    Raises ConflictError when `out` exists and `replace` is false; StorageError when the disk fails.
    """

    def __init__(self, out: Path, *, replace: bool = False) -> None:
        if out.exists() and not replace:
            raise _taken(out)
        if out.exists() and not (out / "composition.json").is_file():
            raise ConflictError(
                f"{out} is not a composed model: it is not replaced",
                expected="a folder with composition.json",
                found="something else",
                remedy="choose another --out",
                path=out,
            )
        self.out, self._replace = out, replace
        self.files: dict[str, dict[str, int | str]] = {}
        with storage_errors(f"creating a folder beside {out}"):
            out.parent.mkdir(parents=True, exist_ok=True)
            self.folder, self._lock = begin_part(out)

    @contextmanager
    def open(self, name: str, staging: Staging | None = None) -> Iterator[HashingWriter]:
        """Write one file, with memory of its own or that of `staging`; several threads may write one each."""
        with storage_errors(f"writing {name}"), HashingWriter(self.folder / name, staging) as writer:
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
        """Make the folder durable and visible. Raises ConflictError where another has appeared at `out` meanwhile."""
        if self.out.exists() and not self._replace:
            raise _taken(self.out)
        with storage_errors(f"publishing {self.out}"):
            self.folder.chmod(0o755)
            fsync_folder(self.folder)
            if not self.out.exists():
                os.rename(self.folder, self.out)
                fsync_folder(self.out.parent)
            elif exchange(self.folder, self.out):
                fsync_folder(self.out.parent)
                shutil.rmtree(self.folder, ignore_errors=True)
            else:  # between two renames a kill leaves the older one aside
                old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".old", dir=self.out.parent))
                os.rename(self.out, old / "replaced")
                os.rename(self.folder, self.out)
                fsync_folder(self.out.parent)
                shutil.rmtree(old, ignore_errors=True)

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
        os.close(self._lock)

"""The folder in which a result is written before it is there, and the step in which it takes its place.

parent/.OUT.<random>.part      locked (flock) by the process that writes it

A process that is killed leaves its folder behind, and the kernel takes its lock away. So whoever next begins a part of
the same OUT can tell what is dead from what is being written, on every clock, and removes it. Where a file system has
no locks nothing is removed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

__all__ = ["begin_part", "exchange", "remove_dead_parts"]

SUFFIX = ".part"
AT_FDCWD = -100
RENAME_EXCHANGE = 2


def begin_part(out: Path) -> tuple[Path, int]:
    """A new folder beside `out`, and the descriptor that keeps it: close it when the folder is done with."""
    remove_dead_parts(out)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=SUFFIX, dir=out.parent))
        descriptor = _open_locked(folder)
        if descriptor is not None:
            return folder, descriptor


def remove_dead_parts(out: Path) -> None:
    """Remove the parts of `out` that nobody writes any more."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]+{re.escape(SUFFIX)}")
    for folder in [path for path in out.parent.iterdir() if name.fullmatch(path.name)]:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # somebody else was faster
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _open_locked(folder: Path) -> int | None:
    """A descriptor with the lock; None where somebody took the new folder for a dead one before it was locked."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(folder), os.fstat(descriptor)):
            return descriptor
    except BlockingIOError:
        pass
    except FileNotFoundError:
        pass
    except OSError:  # a file system without locks: nobody removes it there either
        return descriptor
    os.close(descriptor)
    return None


def exchange(one: Path, other: Path) -> bool:
    """Let two folders take each other's names in one step; False where the system or its file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number), str(other))

"""A throwaway PostgreSQL for the tests: Debian's server in a temporary folder, on a socket that nobody else sees."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["find_server", "running_server"]

# A crash of the test machine may lose this data: nothing waits for a disk.
SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "listen_addresses=")


def find_server() -> Path | None:
    """The folder of PostgreSQL's own programs, the newest where there are several; None where there is none."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parent.parent.name), reverse=True
    )
    place = str(found[0]) if found else shutil.which("initdb")
    return Path(place).parent if place else None


@contextmanager
def running_server(programs: Path, *settings: str) -> Iterator[str]:
    """Run a new cluster; yields the URL of its database `postgres`. Root hands it to a user without rights."""
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path may have 107 characters
    account: dict[str, object] = {}
    if os.geteuid() == 0:
        user = next(entry for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody") and entry.pw_uid)
        os.chown(folder, user.pw_uid, user.pw_gid)
        account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": folder}
    data, quiet = folder / "data", {"stdout": subprocess.DEVNULL, "check": True}
    try:
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "registry", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N"],
            **account, **quiet,
        )  # fmt: skip
        options = " ".join(f"-c {setting}" for setting in (*SETTINGS, f"unix_socket_directories={folder}", *settings))
        control = [programs / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
        subprocess.run([*control, "-o", options, "start"], **account, **quiet)
        try:
            yield f"postgresql+psycopg://registry@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **account, **quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

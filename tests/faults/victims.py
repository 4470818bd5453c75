"""Processes that are killed with SIGKILL: forked from one that has imported everything, so that hundreds cost little.

    after a time     the parent kills, anywhere: inside SQLite's own writes, inside numpy, inside the kernel
    at a call        the process kills itself before its n-th call of those in CALLS, or in the middle of a pwrite, or
                     between two statements of SQL: every boundary between two steps is hit, also the short ones

The operations are the commands of the program, and what it printed on stdout is what it acknowledged.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CALLS", "Blow", "Ended", "Victim", "command", "strike"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.faults.victims", "cli.main", "cli.adapters", "cli.compose", "cli.jobs", "cli.lifecycle", "cli.service",
     "registry.services.local", "registry.services.worker", "registry.api.app", "alembic.command", "uvicorn"]
)  # fmt: skip
CALLS = ("fsync", "replace", "rename", "link", "unlink", "rmdir", "mkdir", "pwrite", "chmod", "utime")
HALF = 4096


@dataclass(frozen=True, slots=True)
class Blow:
    """When a process is killed: `seconds` after it began, or at its `call`-th call; neither is not at all."""

    seconds: float | None = None
    call: int | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: whether it was killed, what it printed, how long it ran and how many calls it made."""

    killed: bool
    code: int | None
    output: str
    errors: str
    seconds: float
    calls: int

    @property
    def said(self) -> Any:
        """The JSON that it printed; None where it did not get that far."""
        try:
            return json.loads(self.output)
        except ValueError:
            return None


class Victim:
    """A running process."""

    def __init__(self, scratch: Path, target: Callable[..., None], *arguments: Any, call: int | None = None) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self.stdout, self.stderr = scratch / "stdout", scratch / "stderr"
        for path in (self.stdout, self.stderr):
            path.write_bytes(b"")
        self._begun, there = CONTEXT.Pipe(duplex=False)
        files = (str(self.stdout), str(self.stderr))
        self._process = CONTEXT.Process(
            target=_live, args=(there, files, dict(os.environ), call, target, arguments), daemon=True
        )
        self._process.start()
        there.close()
        self._calls = 0
        self._heard()
        self._start = time.monotonic()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid
        return self._process.pid

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so long."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def end(self, seconds: float = 120) -> Ended:
        """Wait for the end. What hangs is killed, and is an error of the test."""
        hung = not self.wait(seconds)
        if hung:
            self._process.kill()
            self._process.join()
        assert not hung, f"it did not end in {seconds} s: {self.stderr.read_text()[-2000:]}"
        elapsed, code = time.monotonic() - self._start, self._process.exitcode
        self._heard()
        self._process.close()
        output, errors = self.stdout.read_text(), self.stderr.read_text()
        return Ended(code == -signal.SIGKILL, code, output, errors, elapsed, self._calls)

    def _heard(self) -> None:
        try:
            self._calls = self._begun.recv()
        except (EOFError, ConnectionResetError):
            pass


def strike(scratch: Path, blow: Blow, target: Callable[..., None], *arguments: Any) -> Ended:
    """Start a process, kill it as `blow` says, and tell how it ended."""
    victim = Victim(scratch, target, *arguments, call=blow.call)
    if blow.seconds is not None and not victim.wait(blow.seconds):
        victim.signal(signal.SIGKILL)
    return victim.end()


def command(*words: str) -> None:
    """The program `registry` in this process. Ends it."""
    from cli.main import cli

    cli(list(words))


def _live(
    there: Any,
    files: Sequence[str],
    environment: dict[str, str],
    call: int | None,
    target: Callable[..., None],
    arguments: Sequence[Any],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(files, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    counted = _count(call)
    there.send(0)
    try:
        target(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        there.send(next(counted))


def _count(limit: int | None) -> itertools.count[int]:
    """Count calls and SQL statements from now on; the process dies at the one of number `limit`."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    counter = itertools.count()

    def step(die: Callable[[], object] = lambda: None) -> None:
        if next(counter) == limit:
            die()
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            if name == "pwrite":
                descriptor, data, offset = args
                step(lambda: original(descriptor, data[:HALF], offset))
            else:
                step()
            return original(*args, **options)

        return call

    for name in CALLS:
        setattr(os, name, watched(name))
    event.listen(Engine, "before_cursor_execute", lambda *_: step())
    event.listen(Engine, "commit", lambda *_: step())
    return counter

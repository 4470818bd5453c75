"""How far something long is, in bytes, on stderr: a live line on a terminal, a plain line now and then elsewhere.

Nothing is shown in the first two seconds. A thread redraws, so that a step without news still shows its seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from cli.output import clean, size

__all__ = ["ProgressLine"]

PATIENCE_S = 2.0
LIVE_S = 0.2
PLAIN_S = 10.0
ERASE = "\r\x1b[K"


class ProgressLine:
    """Call it with (step, bytes done, bytes in all; 0 where unknown)."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._started = clock()
        self._step_started = self._started
        self._shown = self._started + PATIENCE_S - (LIVE_S if self._live else PLAIN_S)
        self._state: tuple[str, int, int] | None = None
        self._drawn = False
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, step: str, done: int, total: int) -> None:
        """Take note; drawing is the thread's work."""
        if self._state is None or self._state[0] != step:
            self._step_started = self._clock()
        self._state = (step, done, total)

    def line(self) -> str:
        """The state as text, such as ``merging: 1.2 GiB of 2.0 GiB (60%), 3 s``."""
        if self._state is None:
            return ""
        step, done, total = self._state
        seconds = self._clock() - self._step_started
        parts = [clean(step)]
        if total:
            parts.append(f": {size(done)} of {size(total)} ({min(done / total, 1):.0%})")
        elif done:
            parts.append(f": {size(done)}")
        return f"{''.join(parts)}, {seconds:.0f} s"

    def draw(self) -> None:
        """Show the state if it is time to."""
        now = self._clock()
        if self._state is None or now - self._shown < (LIVE_S if self._live else PLAIN_S):
            return
        self._shown = now
        self._write(f"{ERASE}{self.line()}" if self._live else f"{self.line()}\n")
        self._drawn = self._live

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread:
            self._thread.join()
        if self._drawn:
            self._write(ERASE)

    def _run(self) -> None:
        while not self._done.wait(LIVE_S):
            self.draw()

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # nobody is listening any more; the work goes on
            self._done.set()

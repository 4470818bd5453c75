"""Whether requests can be served now: asked every few seconds by what balances load, so it is cheap and remembered."""

from __future__ import annotations

import time
import uuid
from threading import Lock

from sqlalchemy import Engine

from composer.errors import TypedError
from composer.sinks import storage_errors
from registry.db import current_revision, head_revision
from registry.schemas import Readiness
from registry.store.layout import Layout

__all__ = ["ReadinessProbe"]

REMEMBERED_S = 1.0


class ReadinessProbe:
    """Asks the database for its revision, and the store to take a file."""

    def __init__(self, engine: Engine, layout: Layout) -> None:
        self._engine = engine
        self._layout = layout
        self._wanted: str | None = None
        self._found: tuple[float, Readiness] | None = None
        self._lock = Lock()

    def check(self) -> Readiness:
        """What it found, at most a second ago."""
        with self._lock:
            if self._found is None or time.monotonic() - self._found[0] > REMEMBERED_S:
                self._found = (time.monotonic(), self._look())
            return self._found[1]

    def _look(self) -> Readiness:
        try:
            self._wanted = self._wanted or head_revision(self._engine)
            revision = current_revision(self._engine)
        except TypedError:
            database = schema = False
        else:
            database, schema = True, revision == self._wanted
        store = self._takes_a_file()
        return Readiness(ready=database and schema and store, database=database, migrations=schema, store=store)

    def _takes_a_file(self) -> bool:
        place = self._layout.incoming / f"probe-{uuid.uuid4().hex}"
        try:
            with storage_errors("looking whether the store takes files"):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(b"ready")
                place.unlink()
        except TypedError:
            return False
        return True

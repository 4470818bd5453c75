"""How often versions are downloaded: counted in memory, written now and then, so that no download waits for a disk.

A process that is killed loses the counts of a few seconds; one that ends writes them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter

from sqlalchemy import Engine, select, update

from registry.db import session_scope
from registry.models import AdapterRow, VersionDownloadsRow, VersionRow

__all__ = ["Downloads"]

WRITE_S = 5.0


class Downloads:
    """Counts by the number of a version; shared by all who act on one registry. `total`: since this was made."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.total = 0
        self._counts: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._written = time.monotonic()

    def count(self, version_id: int) -> None:
        """One download of this version more."""
        with self._lock:
            self._counts[version_id] += 1
            self.total += 1
            late = time.monotonic() - self._written > WRITE_S
        if late:
            self.write()

    def write(self) -> None:
        """Bring what was counted into the database."""
        with self._lock:
            counts, self._counts, self._written = self._counts, Counter(), time.monotonic()
        if not counts:
            return
        with session_scope(self._engine, writes=True) as session:
            query = select(VersionRow.id, VersionRow.adapter_id).where(VersionRow.id.in_(list(counts)))
            known = dict(session.execute(query).tuples().all())
            adapters: Counter[int] = Counter()
            for version_id in sorted(known):
                adapters[known[version_id]] += counts[version_id]
                added = {"count": VersionDownloadsRow.count + counts[version_id]}
                row = update(VersionDownloadsRow).where(VersionDownloadsRow.version_id == version_id).values(added)
                if not session.execute(row).rowcount:
                    session.add(VersionDownloadsRow(version_id=version_id, count=counts[version_id]))
            for adapter_id, count in sorted(adapters.items()):
                total = {"downloads": AdapterRow.downloads + count}
                session.execute(update(AdapterRow).where(AdapterRow.id == adapter_id).values(total))

"""A database that is busy is waited for; one that stays busy, or is damaged, is a typed error."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import registry.db
from composer.errors import StorageError
from registry.services.local import open_registry
from tests.faults.shelf import Shelf, files_of, make_adapter


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    """A registry with one adapter."""
    made = Shelf(tmp_path / "home")
    made.registry.publish(make_adapter(tmp_path / "a", 1, rank=2), name="team/a", version="1.0.0", base="base")
    yield made
    made.close()


def test_whoever_finds_the_file_busy_waits(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes for a moment: readers do not notice, a publish and gc wait. It does not end: they say so."""
    source = make_adapter(tmp_path / "b", 2, rank=2)
    shelf.wanted["team/b@1.0.0"] = files_of(source)
    database = str(shelf.home / "registry.db")
    with closing(sqlite3.connect(database, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(registry.db, "BUSY_TIMEOUT_S", 0.2)
        impatient = open_registry(shelf.home)
        for write in (lambda: impatient.publish(source, name="team/b", version="1.0.0"), impatient.collect):
            with pytest.raises(StorageError, match="locked") as refused:
                write()
            assert "try again" in str(refused.value.remedy)
        assert len(impatient.list_adapters().items) == 1
        impatient.close()
        monkeypatch.undo()
        done = threading.Timer(0.5, other.execute, ["ROLLBACK"])
        done.start()
        started = time.monotonic()
        shelf.registry.publish(source, name="team/b", version="1.0.0", base="base")
        assert time.monotonic() - started > 0.2
        done.join()
    assert shelf.lost(["team/a@1.0.0", "team/b@1.0.0"]) + shelf.partial() == []


def test_statistics_are_written_under_the_lock(shelf: Shelf) -> None:
    """gc's ANALYZE writes: begun as a read it would fail at once where another process has written in between."""
    database = str(shelf.home / "registry.db")
    with closing(sqlite3.connect(database, isolation_level=None, timeout=0)) as other:

        def write_between(connection: object, cursor: object, statement: str, *_: object) -> None:
            if statement == "ANALYZE":
                with pytest.raises(sqlite3.OperationalError, match="locked"):
                    other.execute("BEGIN IMMEDIATE")
                tried.append(statement)

        tried: list[str] = []
        registry.db.event.listen(shelf.registry.engine, "before_cursor_execute", write_between)
        shelf.registry.collect()
    assert tried == ["ANALYZE"]


@pytest.mark.parametrize("damage", ["another file", "torn pages"])
def test_a_damaged_database_is_a_typed_error(shelf: Shelf, damage: str) -> None:
    """A file that is no database, and one whose pages are not what they were."""
    shelf.close()
    path = shelf.home / "registry.db"
    data = path.read_bytes()
    path.write_bytes(b"no database" * 1000 if damage == "another file" else data[:4096] + bytes(len(data) - 4096))
    with pytest.raises(StorageError, match="the database failed") as refused:
        open_registry(shelf.home).list_adapters()
    assert "doctor" in str(refused.value.remedy)

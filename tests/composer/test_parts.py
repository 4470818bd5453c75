"""The folder that a result is written in: kept while its writer lives, removed when it is dead."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from composer.errors import ConflictError
from composer.parts import begin_part, exchange
from composer.sinks import FolderSink


def test_parts_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    """A closed descriptor is what a kill leaves; other outputs' parts are not touched."""
    out = tmp_path / "out"
    dead, descriptor = begin_part(out)
    (dead / "file").write_bytes(b"half")
    os.close(descriptor)
    other, living = tmp_path / ".out.more.abcdefgh.part", []
    other.mkdir()
    for _ in range(2):
        living.append(begin_part(out))
        assert not dead.exists()
    assert all(folder.is_dir() for folder, _ in living)
    assert other.is_dir()
    for _, descriptor in living:
        os.close(descriptor)


def test_where_there_are_no_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses flock: a new part is made, and what is beside it may be alive."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr("composer.parts.fcntl.flock", refuse)
    first, one = begin_part(tmp_path / "out")
    second, other = begin_part(tmp_path / "out")
    assert first.is_dir()
    assert second.is_dir()
    os.close(one)
    os.close(other)


def test_a_part_that_was_taken_for_dead_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody removes the new folder in the instant before it is locked."""
    made: list[Path] = []
    original = os.open

    def robbed(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith(".part") and not made:
            made.append(Path(path))
            descriptor = original(path, *args, **options)
            shutil.rmtree(path)
            return descriptor
        return original(path, *args, **options)

    monkeypatch.setattr(os, "open", robbed)
    folder, descriptor = begin_part(tmp_path / "out")
    assert folder.is_dir()
    assert not made[0].exists()
    os.close(descriptor)


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_result_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool) -> None:
    """By exchanging names, or by two renames where the file system cannot; nothing is left beside it."""
    if not in_one_step:
        monkeypatch.setattr("composer.sinks.exchange", lambda *_: False)
    for text in (b"1", b"2"):
        with FolderSink(tmp_path / "out", replace=True) as sink:
            sink.write("composition.json", text)
            sink.commit()
    assert (tmp_path / "out" / "composition.json").read_bytes() == b"2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exchange_says_when_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """False where the C library has no such call, an OSError where a folder is missing."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    with pytest.raises(FileNotFoundError):
        exchange(one, other)
    monkeypatch.setattr("composer.parts.ctypes.CDLL", lambda *_, **__: object())
    assert not exchange(one, other)


def test_what_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Two writers of one new folder: the second is told, and the first one's result stays."""
    with FolderSink(tmp_path / "out") as first, FolderSink(tmp_path / "out") as second:
        for sink, text in ((first, b"1"), (second, b"2")):
            sink.write("file", text)
        first.commit()
        with pytest.raises(ConflictError):
            second.commit()
    assert (tmp_path / "out" / "file").read_bytes() == b"1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

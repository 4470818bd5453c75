"""A disk that is full, that cannot be written, or whose fsync fails: a typed error, nothing told, nothing half visible."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from composer.errors import StorageError
from composer.recipe import parse_recipe
from registry.api.app import create_app
from registry.errors import RepositoryExistsError
from registry.services.jobs import JobService
from registry.services.local import open_registry
from registry.services.pushing import Put
from tests.faults.composing import RECIPES, incomplete
from tests.faults.shelf import Shelf, files_of, make_adapter, make_base
from tests.faults.victims import Blow, command, strike

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    """A registry with one adapter, and the folder of another beside it."""
    made = Shelf(tmp_path / "home")
    for index, name in enumerate(("a", "b")):
        source = make_adapter(tmp_path / name, index, rank=2, size=256)
        made.wanted[f"team/{name}@1.0.0"] = files_of(source)
    made.registry.publish(tmp_path / "a", name="team/a", version="1.0.0", base="base")
    yield made
    made.close()


def publish(shelf: Shelf, folder: Path) -> str:
    """Publish the other adapter."""
    shelf.registry.publish(folder / "b", name="team/b", version="1.0.0", base="base")
    return "team/b@1.0.0"


def push(shelf: Shelf, folder: Path) -> str:
    """Push a new base: its files are stored, linked into a folder and registered from there."""
    source = make_base(folder / "pushed", size=64)
    operations = [Put(path.name, shelf.registry.store.put(path)[0]) for path in sorted(source.iterdir())]
    with suppress(RepositoryExistsError):
        shelf.registry.repository_admin.create("lab/base")
    shelf.registry.pushing.commit("lab/base", "main", operations, title="a base")
    location = Path(shelf.registry.get_base("lab/base").location)
    assert files_of(location) == files_of(folder / "pushed")
    return "team/a@1.0.0"


def compose(shelf: Shelf, folder: Path) -> str:
    """Compose into a new folder."""
    shelf.registry.compose(parse_recipe(RECIPES[0]), folder / "out")
    return "team/a@1.0.0"


@pytest.mark.parametrize("operation", [publish, push, compose], ids=lambda function: function.__name__)
def test_an_fsync_that_fails_is_a_typed_error(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: Callable[[Shelf, Path], str]
) -> None:
    """At each of its fsyncs in turn: nothing is acknowledged or visible by half; then the disk is well and it succeeds."""
    fsync, made, failing = os.fsync, [0], [-1]

    def counted(descriptor: int) -> None:
        made[0] += 1
        if made[0] - 1 == failing[0]:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    failures = 0
    while True:
        made[0], failing[0] = 0, failures
        try:
            ref = operation(shelf, tmp_path)
        except StorageError as error:
            failures, found = failures + 1, error.found
        else:
            break
        assert found == "EIO"
        assert "team/b@1.0.0" not in shelf.visible()
        assert shelf.partial(again=True) == []
        if (tmp_path / "out").exists():  # its last fsync: it is whole, and was not told of
            assert incomplete(tmp_path / "out", digests_of(tmp_path / "out")) == []
            shutil.rmtree(tmp_path / "out")
        assert not list(shelf.registry.layout.incoming.iterdir())
        assert not list(tmp_path.glob(".out.*"))
        assert [base.name for base in shelf.registry.list_bases().items] == ["base"]
    assert failures == made[0] > 2
    assert shelf.lost([ref]) == []
    assert shelf.partial(again=True) == []


def digests_of(out: Path) -> set[str]:
    """The digest of the composition that a record names."""
    return {json.loads((out / "composition.json").read_text())["output_digest"]}


def upload(shelf: Shelf, folder: Path) -> str:
    """Send a new base over REST."""
    source = make_base(folder / "pushed", size=64)
    parts = [("files", (path.name, path.read_bytes())) for path in sorted(source.iterdir())]
    app = create_app(shelf.registry, JobService(shelf.registry, slots=0))
    answer = TestClient(app).post("/api/v1/bases", data={"name": "sent"}, files=parts)
    assert answer.status_code == 201, answer.text
    return "team/a@1.0.0"


@pytest.mark.parametrize("operation", [publish, push, compose, upload], ids=lambda function: function.__name__)
def test_what_is_acknowledged_was_made_durable_first(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: Callable[[Shelf, Path], str]
) -> None:
    """Each new file and each folder that holds one is fsynced after its last change, before the row is committed."""
    fsync, events = os.fsync, []

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        stat = os.fstat(descriptor)
        events.append((stat.st_ino, stat.st_mtime_ns))

    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(os, "fsync", noted)
    sa.event.listen(shelf.registry.engine, "commit", lambda *_: events.append("commit"))
    operation(shelf, tmp_path)
    told = len(events) - events[::-1].index("commit")
    made = [
        path
        for place in (shelf.registry.layout.blobs, shelf.registry.layout.uploads, tmp_path / "out")
        for path in (place, *place.rglob("*"))
        if path.exists() and path not in before
    ]
    assert made
    for path in {*made, *(path.parent for path in made if path.parent != tmp_path / "home")}:
        stat = path.stat()
        assert (stat.st_ino, stat.st_mtime_ns) in events[:told], path


def limited(size: int, *words: str) -> None:
    """The program, where no file may grow beyond `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    command(*words)


@pytest.mark.parametrize("size", [20_000, 60_000, 1 << 30])
def test_a_file_that_may_not_grow_is_a_typed_error(shelf: Shelf, tmp_path: Path, size: int) -> None:
    """RLIMIT_FSIZE stops the database's log, or the weights; with enough of it the same publish succeeds."""
    words = (
        "publish",
        tmp_path / "b",
        "--name",
        "team/b",
        "--version",
        "1.0.0",
        "--base",
        "base",
        "--home",
        shelf.home,
    )
    ended = strike(tmp_path / "printed", Blow(), limited, size, *map(str, (*words, "--format", "json")))
    there = "team/b@1.0.0" in shelf.visible()
    if size > 1_000_000:
        assert (ended.code, there) == (0, True), ended.errors
    else:
        assert (ended.code, there) == (1, False), ended.errors
        assert json.loads(ended.errors.splitlines()[-1])["error"]["code"] == "storage"
    assert shelf.partial(again=True) == []
    assert not list(shelf.registry.layout.incoming.iterdir())


def in_namespace(script: str, *words: Path) -> str:
    """Run a function of this module where mounts are its own; skipped where the system does not allow that."""
    names = ["unshare", "--map-root-user", "--mount"]
    probe = subprocess.run([*names, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"no mounts in a user namespace: {probe.stderr.decode().strip()}")
    code = f"import sys, pathlib, tests.faults.test_disk as t; t.{script}(*map(pathlib.Path, sys.argv[1:]))"
    command = [*names, sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def mount(*words: Any) -> None:
    """Run mount."""
    subprocess.run(["mount", *map(str, words)], check=True)


def fill(disk: Path) -> None:
    """Publish until the disk is full; see what it is like then, and after something was removed."""
    mount("-t", "tmpfs", "-o", "size=4m", "none", disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(1_000_000))
    shelf, told, refused = Shelf(disk / "home"), [], []
    for index in range(40):
        ref, source = f"team/a@1.0.{index}", make_adapter(disk.parent / "source", index)
        shelf.wanted[ref] = files_of(source)
        try:
            shelf.registry.publish(source, name="team/a", version=f"1.0.{index}", base="base")
            told.append(ref)
        except StorageError as error:
            refused.append(error)
        assert set(shelf.visible()) == set(told)
        assert shelf.partial() == []
    assert told
    assert refused
    try:
        shelf.registry.compose(parse_recipe("base+team/a"), disk / "out")
    except StorageError:
        assert [path.name for path in disk.iterdir() if "out" in path.name] == []
    else:
        raise AssertionError("a full disk took a composition")
    ballast.unlink()
    shelf.registry.publish(source, name="team/a", version="2.0.0", base="base")
    shelf.wanted["team/a@2.0.0"] = shelf.wanted[ref]
    assert shelf.left() + shelf.lost([*told, "team/a@2.0.0"]) + shelf.partial(again=True) == []
    print(len(told), len(refused), refused[0].found)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A tmpfs of 4 MiB is filled by publishing: what was acknowledged stays, what was refused is not there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    told, refused, found = in_namespace("fill", disk).strip().split(maxsplit=2)
    assert int(told) + int(refused) == 40
    assert found in ("ENOSPC", "database or disk is full", "disk I/O error")


def forbid(folder: Path) -> None:
    """A store that cannot be written, then nothing that can."""
    shelf = Shelf(folder / "home")
    source = make_adapter(folder / "a", 1, rank=2)
    shelf.wanted["team/a@1.0.0"] = files_of(source)
    shelf.registry.publish(source, name="team/a", version="1.0.0", base="base")
    other = make_adapter(folder / "b", 2, rank=2)
    for place in (folder / "home" / "store", folder / "home"):
        mount("--bind", place, place)
        mount("-o", "remount,bind,ro", place)
        for _ in range(2):
            try:
                shelf.registry.publish(other, name="team/b", base="base")
            except StorageError as error:
                print(error.found)
            else:
                raise AssertionError("it was published")
            if place.name == "store":
                shelf.registry.pull("team/a", folder / "pulled")
                assert files_of(folder / "pulled") == shelf.wanted["team/a@1.0.0"]
                shutil.rmtree(folder / "pulled")
        shelf.registry.engine.dispose()
    try:
        open_registry(folder / "home")
    except StorageError as error:
        print(error.code)
    else:
        raise AssertionError("it was opened")


def test_a_store_that_cannot_be_written_can_be_read(tmp_path: Path) -> None:
    """Publishing is refused with the disk's own reason; pulling goes on; a home that is read-only is said to be so."""
    assert in_namespace("forbid", tmp_path).split("\n")[:2] == ["EROFS", "EROFS"]

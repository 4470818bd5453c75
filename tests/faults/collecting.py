"""kill -9 during `registry gc`, while somebody publishes bytes that it is about to remove."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from registry.services.local import LocalRegistry
from tests.faults.shelf import Shelf, files_of, make_adapter
from tests.faults.victims import Blow, Ended, Victim, command, strike

__all__ = ["CollectSite"]

GARBAGE = 60


class CollectSite:
    """Every round leaves garbage of each kind, collects without grace, and publishes old unnamed bytes meanwhile."""

    name = "gc"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shelf = Shelf(folder / "home")
        self._acknowledged: list[str] = []
        for index in range(5):
            self._publish(make_adapter(folder / f"kept{index}", index), f"team/kept@1.0.{index}")

    def _publish(self, source: Path, ref: str) -> None:
        name, _, version = ref.partition("@")
        self._shelf.wanted[ref] = files_of(source)
        self._shelf.registry.publish(source, name=name, version=version, base="base")
        self._acknowledged.append(ref)

    def strike(self, index: int, blow: Blow) -> Ended:
        """Make garbage, begin to publish some of it, collect and be killed."""
        registry, ref = self._shelf.registry, f"team/again@1.0.{index + 2}"
        source = self._folder / "again"
        shutil.rmtree(source, ignore_errors=True)
        make_adapter(source, 100_000 + index)
        make_garbage(registry, source)
        self._shelf.wanted[ref] = files_of(source)
        words = ("publish", source, "--name", "team/again", "--version", ref.partition("@")[2], "--base", "base")
        options = ("--home", self._shelf.home, "--format", "json")
        beside = Victim(self._folder / "beside", command, *map(str, (*words, *options)))
        ended = strike(self._folder / "out", blow, command, *map(str, ("gc", "--grace", 0, *options)))
        published = beside.end()
        if published.code == 0:
            self._acknowledged.append(ref)
        return ended

    def lost(self, ended: Ended) -> list[str]:
        """A version that stays is gone."""
        return self._shelf.lost(self._acknowledged)

    def partial(self, ended: Ended) -> list[str]:
        """A version that stays lacks a file."""
        return self._shelf.partial(again=True)

    def recover(self) -> list[str]:
        """The next collection takes what this one left."""
        left = self._shelf.left()
        layout = self._shelf.registry.layout
        for place in (layout.uploads, layout.imports, layout.graphs):
            left += [f"{path} is still there" for path in place.glob("*")]
        return left + self._shelf.lost(self._acknowledged) + self._shelf.partial(again=True)

    def left(self) -> list[str]:
        """Nothing."""
        left = self._shelf.left()
        self._shelf.close()
        return left


def make_garbage(registry: LocalRegistry, source: Path) -> None:
    """Old bytes that nothing names, those of `source` among them, and what was left half-written everywhere."""
    layout = registry.layout
    for path in source.iterdir():
        registry.store.put(path)
    for _ in range(GARBAGE):
        with registry.store.receive() as writer:
            writer.write(os.urandom(2000))
    for place in (layout.incoming, layout.uploads, layout.imports, layout.compositions):
        (place / uuid.uuid4().hex).mkdir(parents=True)
        (next(place.iterdir()) / "file").write_bytes(b"half")
    layout.graphs.mkdir(exist_ok=True)
    (layout.graphs / f".{uuid.uuid4().hex}.tmp").write_bytes(b"half")
    for path in layout.home.rglob("*"):
        if path.is_file() and "registry.db" not in path.name:
            os.utime(path, (0, 0))
    for place in (layout.incoming, layout.uploads, layout.imports, layout.compositions):
        for path in place.iterdir():
            os.utime(path, (0, 0))

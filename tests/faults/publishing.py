"""kill -9 during `registry publish`."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.faults.shelf import Shelf, files_of, make_adapter
from tests.faults.victims import Blow, Ended, command, strike

__all__ = ["PublishSite"]


class PublishSite:
    """Every round publishes new bytes as a new version of one of five adapters."""

    name = "publish"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shelf = Shelf(folder / "home")
        self._source = folder / "source"
        self._acknowledged: list[str] = []
        self._ref = ""

    def strike(self, index: int, blow: Blow) -> Ended:
        """Publish, killed."""
        shutil.rmtree(self._source, ignore_errors=True)
        make_adapter(self._source, index + 1000)
        name, version = f"team/a{index % 5}", f"1.0.{index + 2}"
        self._ref = f"{name}@{version}"
        self._shelf.wanted[self._ref] = files_of(self._source)
        words = ("publish", self._source, "--name", name, "--version", version, "--base", "base")
        options = ("--home", self._shelf.home, "--format", "json")
        return strike(self._folder / "out", blow, command, *map(str, (*words, *options)))

    def lost(self, ended: Ended) -> list[str]:
        """Acknowledged versions that are gone."""
        if ended.said is not None:
            self._acknowledged.append(self._ref)
        return self._shelf.lost(self._acknowledged)

    def partial(self, ended: Ended) -> list[str]:
        """Visible versions that are not whole."""
        return self._shelf.partial()

    def recover(self) -> list[str]:
        """The same publish again: it makes the version or finds it whole."""
        there = self._ref in self._shelf.visible()
        name, _, version = self._ref.partition("@")
        made = self._shelf.registry.publish(self._source, name=name, version=version, base="base")
        self._acknowledged.append(self._ref)
        problems = [] if made.created != there else [f"{self._ref}: created {made.created}, was there {there}"]
        return problems + self._shelf.lost([self._ref]) + self._shelf.partial()

    def left(self) -> list[str]:
        """All versions are read again after the collection."""
        left = self._shelf.left() + self._shelf.lost(self._acknowledged) + self._shelf.partial(again=True)
        self._shelf.close()
        return left

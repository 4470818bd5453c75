"""Many publishers at once, each a process of its own, on one catalogue.

All of them open a registry that is not there yet. In every round all of them publish other bytes under the same new version, which one of them gets; then each publishes
bytes of its own without naming a version, to an adapter that all share, and to an adapter of its own.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.shelf import Shelf, files_of, make_adapter
from tests.faults.victims import CONTEXT, Victim

__all__ = ["WRITER_HEADINGS", "Contest", "contest"]

WRITER_HEADINGS = ("database", "publishers", "rounds", "won once", "refused", "others published", "lost", "errors")
SIZE, RANK = 16, 2
HOURS = 3600


@dataclass(slots=True)
class Contest:
    """What became of all publishes."""

    database: str
    writers: int
    rounds: int
    won_once: int
    refused: int
    others: int
    wrong: list[str]
    errors: list[str]

    @property
    def row(self) -> tuple[Any, ...]:
        """In the order of WRITER_HEADINGS."""
        return (self.database, self.writers, self.rounds, self.won_once, self.refused, self.others, len(self.wrong),
                len(self.errors))  # fmt: skip


def contest(folder: Path, writers: int, rounds: int, database_url: str | None = None) -> Contest:
    """Let them publish, and look at what is in the catalogue afterwards."""
    home = folder / "home"
    barrier = CONTEXT.Barrier(writers)
    running = [
        Victim(folder / f"writer{number}", write, str(home), database_url, number, rounds, barrier)
        for number in range(writers)
    ]
    told = [json.loads(line) for victim in running for line in victim.end(HOURS).output.splitlines()]
    shelf = Shelf(home, database_url)
    winners = Counter(said["version"] for said in told if said["what"] == "won")
    shelf.wanted = {said["version"]: said["files"] for said in told if said["files"]}
    published = [said["version"] for said in told if said["files"]]
    wrong = shelf.lost(published) + shelf.partial()
    twice = [ref for ref, count in Counter(published).items() if count > 1]
    wrong += [f"{ref} was acknowledged to two publishers" for ref in twice]
    visible = shelf.visible()
    wrong += [f"{ref} is there, and nobody was told" for ref in visible.keys() - set(published)]
    found = Contest(
        shelf.registry.engine.dialect.name, writers, rounds,
        won_once=sum(count == 1 for count in winners.values()),
        refused=sum(said["what"] == "taken" for said in told),
        others=sum(said["what"] in ("shared", "own") for said in told),
        wrong=wrong, errors=[said["error"] for said in told if said["what"] == "error"],
    )  # fmt: skip
    shelf.close()
    return found


def write(home: str, database_url: str | None, number: int, rounds: int, barrier: Any) -> None:
    """One publisher: prints a line for each publish."""
    from registry.errors import VersionTakenError
    from registry.services.local import open_registry

    barrier.wait(HOURS)
    registry = open_registry(Path(home), database_url)
    source = Path(home).parent / f"writer{number}" / "source"
    for index in range(rounds):
        for what, name, version in (
            ("won", "team/one", f"1.0.{index}"), ("shared", "team/shared", None), ("own", f"team/own{number}", None)
        ):  # fmt: skip
            shutil.rmtree(source, ignore_errors=True)
            make_adapter(source, 1 + number + 1000 * index, RANK, SIZE)
            barrier.wait(HOURS)
            said = {"what": what, "version": f"{name}@{version}", "files": None}
            try:
                made = registry.publish(source, name=name, version=version)
                said |= {"version": f"{name}@{made.version.version}", "files": files_of(source)}
            except VersionTakenError as error:
                said |= {"what": "taken"} if what == "won" else {"what": "error", "error": str(error)}
            except Exception as error:  # noqa: BLE001
                said |= {"what": "error", "error": f"{type(error).__name__}: {error}"}
            print(json.dumps(said), flush=True)
    registry.close()

"""kill -9 during `registry compose`, and of `registry worker` in a job that composes."""

from __future__ import annotations

import json
import shutil
import time
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa

from composer.recipe import parse_recipe
from registry.db import session_scope
from registry.models import CompositionRow, JobRow, now
from registry.schemas import JobState
from tests.faults.shelf import Shelf, make_adapter, sha256
from tests.faults.victims import Blow, Ended, command, strike

__all__ = ["ComposeSite", "JobSite"]

RECIPES = ("base+team/a:0.5", "base+team/a:0.25+team/b")


def shelf_with_adapters(folder: Path) -> Shelf:
    """A registry with two adapters."""
    shelf = Shelf(folder / "home")
    for index, name in enumerate(("a", "b")):
        source = make_adapter(folder / name, index)
        shelf.registry.publish(source, name=f"team/{name}", version="1.0.0", base="base")
    return shelf


def incomplete(out: Path, digests: set[str]) -> list[str]:
    """What is wrong with a composition: files that it does not name, bytes that it does not, another model."""
    try:
        record = json.loads((out / "composition.json").read_text())
    except (OSError, ValueError) as error:
        return [f"{out.name} is there without its record: {error}"]
    found = {path.name: sha256(path) for path in out.iterdir() if path.name != "composition.json"}
    wanted = {name: entry["sha256"] for name, entry in record["outputs"].items()}
    problems = [] if found == wanted else [f"{out.name} holds {found}, its record names {wanted}"]
    return problems + ([] if record["output_digest"] in digests else [f"{out.name} is another model"])


class ComposeSite:
    """By turns into a new folder, and over one that holds another composition, which stays until the new one is whole."""

    name = "compose"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shelf = shelf_with_adapters(folder)
        self._out = folder / "made" / "out"
        self._recipe, self._before = RECIPES[0], False
        self._digests = {
            recipe: self._shelf.registry.compose(parse_recipe(recipe), folder / f"reference{index}").output_digest
            for index, recipe in enumerate(RECIPES)
        }

    def strike(self, index: int, blow: Blow) -> Ended:
        """Compose, killed."""
        self._before = index % 4 > 1 and self._out.exists()
        self._recipe = RECIPES[index % 3 % 2]
        if not self._before:
            shutil.rmtree(self._out, ignore_errors=True)
        with session_scope(self._shelf.registry.engine, writes=True) as session:
            session.execute(sa.delete(CompositionRow))
        words = ("compose", self._recipe, "--out", self._out, "--force", "--home", self._shelf.home)
        return strike(self._folder / "printed", blow, command, *map(str, (*words, "--format", "json")))

    def lost(self, ended: Ended) -> list[str]:
        """A composition that was there, or that was acknowledged, is gone."""
        gone = (self._before or ended.said is not None) and not self._out.is_dir()
        return ["the composition is gone"] if gone else []

    def partial(self, ended: Ended) -> list[str]:
        """A folder is there that is not a whole composition."""
        return incomplete(self._out, set(self._digests.values())) if self._out.exists() else []

    def recover(self) -> list[str]:
        """The same compose again: the same model, its record in the catalogue, and nothing else beside it."""
        made = self._shelf.registry.compose(parse_recipe(self._recipe), self._out, replace=True)
        problems = incomplete(self._out, {self._digests[self._recipe]})
        if made.output_digest != self._digests[self._recipe]:
            problems.append(f"{self._recipe} gave {made.output_digest}")
        beside = [path.name for path in self._out.parent.iterdir() if path != self._out]
        with session_scope(self._shelf.registry.engine) as session:
            recorded = session.scalar(sa.select(sa.func.count()).select_from(CompositionRow))
        return problems + [f"{name} was left" for name in beside] + ([] if recorded else ["it is not recorded"])

    def left(self) -> list[str]:
        """Nothing in the registry."""
        left = self._shelf.left() + self._shelf.partial(again=True)
        self._shelf.close()
        return left


class JobSite:
    """A worker is killed in a job; another one takes it when the lease is over."""

    name = "job"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shelf = shelf_with_adapters(folder)
        self._digests: dict[str, str] = {}
        self._job = ""

    def strike(self, index: int, blow: Blow) -> Ended:
        """Submit, and work until killed."""
        registry = self._shelf.registry
        self._job = registry.submit(parse_recipe(f"base+team/a:{0.001 * (index + 3):.3f}")).id
        words = ("worker", "--drain", "--home", self._shelf.home)
        ended = strike(self._folder / "printed", blow, command, *map(str, words))
        done = registry.get_job(self._job).state is JobState.SUCCEEDED  # what it acknowledges is the job's state
        said = json.dumps({"job": self._job}) if done else ""
        return Ended(ended.killed, ended.code, said, ended.errors, ended.seconds, ended.calls)

    def lost(self, ended: Ended) -> list[str]:
        """A job that succeeded has no output, or a job is gone."""
        info = self._shelf.registry.get_job(self._job)
        gone = info.state is JobState.SUCCEEDED and not self._output(self._job).is_dir()
        odd = info.state not in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED)
        return [f"the job is {info.state}, its output is {'gone' if gone else 'there'}"] if gone or odd else []

    def partial(self, ended: Ended) -> list[str]:
        """An output is there that is not whole."""
        out = self._output(self._job)
        if not out.exists():
            return []
        record = json.loads((out / "composition.json").read_text())
        return incomplete(out, {record["output_digest"]})

    def recover(self) -> list[str]:
        """Its lease runs out, and the next worker ends it; nothing half-written stays."""
        registry = self._shelf.registry
        late = {"lease_until": now() - timedelta(seconds=1)}
        with session_scope(registry.engine, writes=True) as session:
            session.execute(sa.update(JobRow).where(JobRow.state == "running").values(**late))
        from registry.services.worker import Worker

        Worker(registry).drain()
        info = registry.get_job(self._job)
        if info.state is not JobState.SUCCEEDED:
            return [f"the job is {info.state}: {info.error}"]
        problems = incomplete(self._output(self._job), {info.result.output_digest})
        beside = [path.name for path in registry.layout.compositions.glob(".*")]
        return problems + [f"{name} was left" for name in beside]

    def left(self) -> list[str]:
        """Jobs and their outputs go with the collection."""
        time.sleep(0.01)  # a job that ended in this very microsecond is not over for so long as 0 days
        left = self._shelf.left()
        self._shelf.close()
        return left

    def _output(self, job: str) -> Path:
        return self._shelf.registry.layout.compositions / job

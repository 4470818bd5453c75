"""A service and a worker that are told to end: what runs is given back, nothing half-written stays, nothing is forgotten."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from composer.recipe import parse_recipe
from registry.db import session_scope
from registry.models import JobRow, VersionDownloadsRow
from registry.schemas import JobState
from registry.services.worker import Worker
from tests.faults.composing import incomplete, shelf_with_adapters
from tests.faults.shelf import Shelf
from tests.faults.victims import Victim, command

DEADLINE_S = 60
HELD = "a block is being merged"
SERVE, WORKER = ("serve", "--port", "0"), ("worker",)


def held(deep: bool, *words: str) -> None:
    """The program, with a merge in which every block takes until the worker is told to stop; or, `deep`, for ever."""
    import cli.jobs
    import composer.run
    import registry.api.app
    import registry.services.worker

    merge, begin, stopping = composer.run.merge_block, registry.services.worker.Worker.__init__, []

    def known(self: Worker, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        stopping.append(self.stopping)

    def held_merge(*args: Any) -> Any:
        print(HELD, file=sys.stderr, flush=True)
        while deep or not any(event.is_set() for event in stopping):
            time.sleep(0.02)
        return merge(*args)

    composer.run.merge_block = held_merge
    registry.services.worker.Worker.__init__ = known  # type: ignore[method-assign]
    registry.api.app.STOP_S = cli.jobs.STOP_S = 0.5 if deep else DEADLINE_S
    command(*words)


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    """A registry with two adapters."""
    made = shelf_with_adapters(tmp_path)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("words", [SERVE, WORKER], ids=["serve", "worker"])
@pytest.mark.parametrize(("deep", "number"), [(False, signal.SIGTERM), (False, signal.SIGINT), (True, signal.SIGTERM)])
def test_what_runs_is_given_back(
    shelf: Shelf, tmp_path: Path, words: tuple[str, ...], deep: bool, number: signal.Signals
) -> None:
    """Between two blocks or deep inside one: the program ends with 0, its job waits as if it had never begun."""
    registry = shelf.registry
    job = registry.submit(parse_recipe("base+team/a:0.5")).id
    process = Victim(tmp_path / "process", held, deep, *words, "--home", str(shelf.home), "--format", "quiet")
    deadline = time.monotonic() + DEADLINE_S
    while HELD not in process.stderr.read_text():
        assert time.monotonic() < deadline, process.stderr.read_text()
        time.sleep(0.01)
    if words[0] == "serve":
        url = process.stdout.read_text().strip()
        assert httpx.get(f"{url}/api/v1/adapters/team/a/files/adapter_model.safetensors").status_code == 200
    process.signal(number)
    ended = process.end(DEADLINE_S)
    assert ended.code == 0, ended.errors
    with session_scope(registry.engine) as session:
        row = session.get_one(JobRow, job)
        counted = session.scalar(sa.select(VersionDownloadsRow.count)) or 0
    assert (row.state, row.attempts, row.worker, row.lease_until) == ("queued", 0, None, None)
    assert counted == (words[0] == "serve")
    assert bool(list(registry.layout.compositions.iterdir())) == deep
    Worker(registry).drain()
    info = registry.get_job(job)
    assert (info.state, info.attempts) == (JobState.SUCCEEDED, 1)
    assert [path.name for path in registry.layout.compositions.iterdir()] == [job]
    assert incomplete(registry.layout.compositions / job, {info.result.output_digest}) == []

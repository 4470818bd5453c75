"""A clock that jumps, by years and in both directions: what depends on it comes early or late, and nothing is lost."""

from __future__ import annotations

import datetime
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from composer.recipe import parse_recipe
from registry.access import Scope
from registry.errors import AuthenticationError
from registry.schemas import JobState
from registry.services.worker import Worker, _Run
from tests.faults.composing import incomplete, shelf_with_adapters
from tests.faults.shelf import Shelf, make_adapter

YEAR_S = 365 * 86400.0
Jump = Callable[[float], None]


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    """A registry with two adapters."""
    made = shelf_with_adapters(tmp_path)
    yield made
    made.close()


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Jump:
    """Sets the clock of this process so many seconds off the machine's, which dates the files."""

    def set_clock(seconds: float) -> None:
        class Shifted(datetime.datetime):
            """The wrong time."""

            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
                return datetime.datetime.now(tz) + datetime.timedelta(seconds=seconds)

        monkeypatch.setattr("registry.models.datetime", Shifted)
        wrong = types.SimpleNamespace(time=lambda: time.time() + seconds)
        monkeypatch.setattr("registry.services.collection.time", wrong)

    return set_clock


@pytest.mark.parametrize("seconds", [YEAR_S, -YEAR_S])
def test_a_job_of_a_dead_worker_is_taken_whatever_the_clock_says(shelf: Shelf, jump: Jump, seconds: float) -> None:
    """Forwards its lease is over, backwards it is longer than any; the first worker, should it live, changes nothing."""
    registry = shelf.registry
    job = registry.submit(parse_recipe("base+team/a:0.5")).id
    first, second = Worker(registry), Worker(registry)
    taken = first._take()
    assert taken[0] == job
    second.drain()
    assert registry.get_job(job).state is JobState.RUNNING
    jump(seconds)
    second.drain()
    info = registry.get_job(job)
    assert (info.state, info.attempts) == (JobState.SUCCEEDED, 2)
    _Run(first, job).run(*taken[1:])
    assert registry.get_job(job) == info
    assert incomplete(registry.layout.compositions / job, {info.result.output_digest}) == []


def test_the_latest_version_is_the_highest_and_not_the_youngest(shelf: Shelf, tmp_path: Path, jump: Jump) -> None:
    """Published a year before the one below it, by its date."""
    jump(-YEAR_S)
    shelf.registry.publish(make_adapter(tmp_path / "new", 5), name="team/a", version="1.1.0", base="base")
    found = shelf.registry.get_version("team/a")
    assert found.version == "1.1.0"
    assert found.created_at < shelf.registry.get_version("team/a@1.0.0").created_at
    assert [item.version for item in shelf.registry.list_versions("team/a").items] == ["1.1.0", "1.0.0"]
    jump(YEAR_S)
    assert shelf.registry.publish(make_adapter(tmp_path / "newer", 6), name="team/a").version.version == "1.1.1"


def test_a_token_ends_by_the_clock_or_by_its_admin(shelf: Shelf, jump: Jump) -> None:
    """An expired token is good again when the clock is set back; a revoked one never is."""
    tokens = shelf.registry.tokens
    kept, ended = (tokens.create(name, "ann", (Scope.READ,), None, 30) for name in ("kept", "ended"))
    tokens.revoke(ended.info.id)
    for seconds, valid in ((0.0, True), (YEAR_S, False), (-YEAR_S, True)):
        jump(seconds)
        for token, good in ((kept, valid), (ended, False)):
            if good:
                assert shelf.registry.authenticator().authenticate(token.token).subject == "ann"
                continue
            with pytest.raises(AuthenticationError):
                shelf.registry.authenticator().authenticate(token.token)


def test_gc_by_a_wrong_clock_takes_nothing_that_is_in_use(shelf: Shelf, jump: Jump) -> None:
    """A year ahead all is old: what nothing names goes early, the rest stays. A year back all is young: it goes later."""
    registry = shelf.registry
    running, waiting = (registry.submit(parse_recipe(f"base+team/a:{weight}")).id for weight in (0.5, 0.6))
    Worker(registry)._take()
    part = registry.layout.compositions / f".{running}.abcdefgh.part"
    part.mkdir(parents=True)
    with registry.store.receive() as writer:
        writer.write(b"nobody's")
    jump(-YEAR_S)
    assert registry.collect().blobs == 0
    jump(YEAR_S)
    assert registry.collect().blobs == 1
    assert not registry.store.holds(writer.sha256)
    assert part.is_dir()
    assert [registry.get_job(job).state for job in (running, waiting)] == [JobState.RUNNING, JobState.QUEUED]
    assert shelf.lost(["team/a@1.0.0", "team/b@1.0.0"]) + shelf.partial(again=True) == []

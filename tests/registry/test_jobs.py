"""Jobs: submitted once, run under a lease, cancelled, retried, and taken up again after a kill -9."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from composer.errors import ConflictError, NotFoundError, PolicyError
from composer.recipe import parse_recipe
from registry.db import session_scope
from registry.errors import JobNotFoundError
from registry.models import JobRow, now
from registry.schemas import JobInfo, JobState, Relation
from registry.services.jobs import JobLimits, JobService
from registry.services.local import LocalRegistry
from registry.services.worker import Worker
from tests.support import write_base, write_lora

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def registry(any_registry: LocalRegistry) -> LocalRegistry:
    """An empty registry on each database."""
    return any_registry


@pytest.fixture
def jobs(registry: LocalRegistry, tmp_path: Path) -> Iterator[JobService]:
    """A service over a registry with one base and one adapter; its worker is not started."""
    base = write_base(tmp_path / "base", {f"{MODULE}.weight": np.ones((6, 4), np.float32)})
    registry.add_base(base, name="base")
    registry.publish(write_lora(tmp_path / "lora", {MODULE: (6, 4)}), name="a", base="base")
    service = JobService(registry)
    yield service
    service.stop()


def wait(jobs: JobService, job_id: str, done: Callable[[JobInfo], bool]) -> JobInfo:
    """The job once `done` holds, within a minute."""
    deadline = time.monotonic() + 60
    while not done(info := jobs.get(job_id)):
        assert time.monotonic() < deadline, info
        time.sleep(0.05)
    return info


def finished(info: JobInfo) -> bool:
    """Whether a job is over."""
    return info.finished_at is not None


def test_a_job_composes_what_the_registry_does(jobs: JobService, registry: LocalRegistry, tmp_path: Path) -> None:
    """The same output digest as composing at once, and its files are there."""
    job = jobs.submit(parse_recipe("base+a:0.5"))
    assert job.state is JobState.QUEUED
    jobs.start()
    info = wait(jobs, job.id, finished)
    assert info.state is JobState.SUCCEEDED
    direct = registry.compose(parse_recipe("base+a:0.5"), tmp_path / "out")
    assert info.result.output_digest == direct.output_digest
    files = jobs.files(job.id)
    assert files["model.safetensors"].read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert info.result.out == ""


def test_what_cannot_work_is_refused_at_once(jobs: JobService) -> None:
    """A job that names nothing is not queued."""
    with pytest.raises(NotFoundError):
        jobs.submit(parse_recipe("base+nothing"))
    assert jobs.list(10, None).items == ()
    with pytest.raises(JobNotFoundError):
        jobs.get("nothing")


def test_a_job_that_fails_keeps_its_typed_error(jobs: JobService, registry: LocalRegistry) -> None:
    """The base is changed after the submit: the job fails with the code and the remedy."""
    job = jobs.submit(parse_recipe("base+a"))
    (Path(registry.get_base("base").location) / "model.safetensors").write_bytes(b"gone")
    jobs.start()
    info = wait(jobs, job.id, finished)
    assert (info.state, info.error["code"]) == (JobState.FAILED, "base-changed")
    assert info.error["remedy"]
    with pytest.raises(ConflictError, match="no output"):
        jobs.files(job.id)
    assert not list(registry.layout.compositions.glob("*"))


def test_a_queued_job_is_cancelled_and_a_finished_one_is_not(jobs: JobService) -> None:
    """Cancelled before it ran, it never runs."""
    job = jobs.submit(parse_recipe("base+a"))
    assert jobs.cancel(job.id).state is JobState.CANCELLED
    jobs.start()
    other = jobs.submit(parse_recipe("base+a:2"))
    assert wait(jobs, other.id, finished).state is JobState.SUCCEEDED
    assert jobs.get(job.id).state is JobState.CANCELLED
    with pytest.raises(ConflictError):
        jobs.cancel(other.id)


def hold(registry: LocalRegistry, job_id: str, *, seconds: float, **values: object) -> None:
    """Make a job look as if another worker ran it, with so much of its lease left."""
    lease = {"state": "running", "worker": "elsewhere", "lease_until": now() + timedelta(seconds=seconds), **values}
    with session_scope(registry.engine, writes=True) as session:
        session.execute(sa.update(JobRow).where(JobRow.id == job_id).values(**lease))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"attempts": 1}, JobState.SUCCEEDED),
        ({"attempts": 1, "cancelling": True}, JobState.CANCELLED),
        ({"attempts": 3}, JobState.FAILED),
    ],
)
def test_a_job_whose_lease_ran_out_is_taken_up(
    jobs: JobService, registry: LocalRegistry, values: dict[str, object], expected: JobState
) -> None:
    """It runs again, unless it was being cancelled or has killed three workers; its half-written folder goes."""
    job = jobs.submit(parse_recipe("base+a"))
    hold(registry, job.id, seconds=-1, **values)
    leftover = registry.layout.compositions / f".{job.id}.dead.part"
    leftover.mkdir(parents=True)
    Worker(registry).drain()
    info = jobs.get(job.id)
    assert info.state is expected
    if expected is JobState.SUCCEEDED:
        assert (info.attempts, leftover.exists()) == (2, False)
    if expected is JobState.FAILED:
        assert "died 3 times" in info.error["message"]


def test_a_job_under_a_lease_is_left_alone(jobs: JobService, registry: LocalRegistry) -> None:
    """Another worker's job is not taken, and what is cancelled there is asked, not forced."""
    job = jobs.submit(parse_recipe("base+a"))
    hold(registry, job.id, seconds=60)
    Worker(registry).drain()
    assert jobs.get(job.id).state is JobState.RUNNING
    assert (jobs.cancel(job.id).state, jobs.get(job.id).step) == (JobState.RUNNING, "cancelling")


def test_a_worker_that_lost_its_lease_changes_nothing(
    jobs: JobService, registry: LocalRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker took the job in the middle of the run: the first one neither ends it nor overwrites its state."""
    job = jobs.submit(parse_recipe("base+a"))
    compose = registry.compose

    def robbed(*args: Any, **options: Any) -> Any:
        hold(registry, job.id, seconds=60)
        return compose(*args, **options)

    monkeypatch.setattr(registry, "compose", robbed)
    assert Worker(registry)._run_one()
    assert (jobs.get(job.id).state, jobs.get(job.id).result) == (JobState.RUNNING, None)


def test_a_running_job_is_cancelled_by_its_heartbeat(
    jobs: JobService, registry: LocalRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step without progress learns of the cancel through the lease, and stops at its next report."""
    job = jobs.submit(parse_recipe("base+a"))

    def slow(*_: Any, progress: Any, **__: Any) -> Any:
        jobs.cancel(job.id)
        for _ in range(3000):
            progress("merging", 1, 2)
            time.sleep(0.02)
        raise AssertionError("it was not stopped")

    monkeypatch.setattr(registry, "compose", slow)
    Worker(registry, lease_s=0.5).drain()
    assert jobs.get(job.id).state is JobState.CANCELLED
    monkeypatch.undo()
    assert jobs.retry(job.id).state is JobState.QUEUED
    Worker(registry).drain()
    assert jobs.get(job.id).state is JobState.SUCCEEDED


def test_stopping_a_worker_queues_its_job_again(
    jobs: JobService, registry: LocalRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shutdown is no attempt: the job waits as if it had never begun."""
    job = jobs.submit(parse_recipe("base+a"))
    worker = Worker(registry)

    def interrupted(*_: Any, progress: Any, **__: Any) -> Any:
        worker.stopping.set()
        progress("merging", 1, 2)

    monkeypatch.setattr(registry, "compose", interrupted)
    worker.drain()
    worker._run_one()
    info = jobs.get(job.id)
    assert (info.state, info.attempts, info.finished_at) == (JobState.QUEUED, 0, None)


def test_a_worker_that_does_not_stop_gives_its_job_back(
    jobs: JobService, registry: LocalRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long step has no place to stop at: the job is queued as if it had never begun, and the thread changes nothing."""
    job = jobs.submit(parse_recipe("base+a"))
    begun, release, compose = threading.Event(), threading.Event(), registry.compose

    def stuck(*args: Any, **options: Any) -> Any:
        begun.set()
        release.wait(60)
        return compose(*args, **{**options, "progress": None})

    monkeypatch.setattr(registry, "compose", stuck)
    worker = Worker(registry)
    worker.start()
    assert begun.wait(60)
    assert not worker.stop(0.1)
    for _ in range(2):
        info = jobs.get(job.id)
        assert (info.state, info.attempts, info.finished_at) == (JobState.QUEUED, 0, None)
        release.set()
        assert worker.stop()


def test_the_same_recipe_twice_is_one_job_and_one_result(jobs: JobService, registry: LocalRegistry) -> None:
    """While it waits and after it succeeded; other inputs, or a result that is gone, are another job."""
    first = jobs.submit(parse_recipe("base+a:0.5"))
    assert jobs.submit(parse_recipe("base+a@0.1.0:0.5")).id == first.id
    Worker(registry).drain()
    again = jobs.submit(parse_recipe("base+a:0.5"))
    assert (again.id, again.state) == (first.id, JobState.SUCCEEDED)
    assert jobs.submit(parse_recipe("base+a:0.6")).id != first.id
    shutil.rmtree(registry.layout.compositions / first.id)
    assert jobs.submit(parse_recipe("base+a:0.5")).id != first.id


def test_of_many_submitters_at_once_all_get_one_job(jobs: JobService) -> None:
    """Sixteen threads submit the same recipe; the database holds one job."""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: jobs.submit(parse_recipe("base+a:0.25")).id, range(16)))
    assert len(set(found)) == 1
    assert len(jobs.list(100, None).items) == 1


def test_an_alias_that_moves_changes_no_job(jobs: JobService, registry: LocalRegistry, tmp_path: Path) -> None:
    """The version that a recipe meant when it was submitted is composed."""
    job = jobs.submit(parse_recipe("base+a"))
    registry.publish(write_lora(tmp_path / "new", {MODULE: (6, 4)}, seed=9), name="a", base="base")
    Worker(registry).drain()
    record = jobs.get(job.id).result.record
    assert [entry["version"] for entry in record["adapters"]] == ["0.1.0"]


def test_the_queue_and_the_disk_are_limited(registry: LocalRegistry, jobs: JobService) -> None:
    """Too many waiting jobs, too many bytes of compositions, too little room left: each is refused by name."""
    jobs.submit(parse_recipe("base+a:0.1"))
    need = registry.plan(parse_recipe("base+a:0.2")).nbytes
    for limits, code in (
        (JobLimits(queued=1), "queue-full"),
        (JobLimits(disk_bytes=2 * need - 1), "disk-limit"),
        (JobLimits(free_bytes=1 << 62), "disk-limit"),
    ):
        with pytest.raises(PolicyError) as refused:
            JobService(registry, limits=limits).submit(parse_recipe("base+a:0.2"))
        assert refused.value.code == code
    assert JobService(registry, limits=JobLimits(queued=2, disk_bytes=2 * need)).submit(parse_recipe("base+a:0.2"))


def test_bases_are_added_and_verified_as_jobs(jobs: JobService, registry: LocalRegistry, tmp_path: Path) -> None:
    """The same facts as at once; a changed weight is found by name."""
    folder = write_base(tmp_path / "other", {"a.weight": np.ones((2, 2), np.float32), "b": np.zeros(4, np.float32)})
    added = jobs.submit_base(folder, "other", "base", Relation.MERGED)
    verified = jobs.submit_verify("base")
    Worker(registry).drain()
    assert jobs.get(added.id).result.fingerprint == registry.get_base("other").fingerprint
    assert jobs.get(verified.id).result.intact
    write_base(folder, {"a.weight": np.ones((2, 2), np.float32), "b": np.full(4, 2, np.float32)})
    check = registry.verify_base("other")
    assert (check.intact, check.changed) == (False, ("b",))


@pytest.mark.slow
def test_a_worker_killed_in_a_job_loses_it_to_another(any_registry: LocalRegistry, tmp_path: Path) -> None:
    """kill -9 of a real worker process: another one takes the job when the lease ends, and the result is the same."""
    registry = any_registry
    weights = np.random.default_rng(1).standard_normal((4096, 2048), np.float32)
    names = [f"model.layers.{index}.self_attn.q_proj" for index in range(8)]
    registry.add_base(write_base(tmp_path / "big", {f"{name}.weight": weights for name in names}), name="big")
    registry.publish(
        write_lora(tmp_path / "biglora", dict.fromkeys(names, weights.shape), rank=32), name="l", base="big"
    )
    job = registry.submit(parse_recipe("big+l"))
    url = registry.engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "cli", "--database-url", url, "worker", "--lease", "1.5"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    victim = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not list(registry.layout.compositions.glob(f".{job.id}.*.part")):
        assert time.monotonic() < deadline
        assert victim.poll() is None
    os.kill(victim.pid, signal.SIGSTOP)
    running = registry.get_job(job.id)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert (running.state, running.attempts) == (JobState.RUNNING, 1)
    survivor = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not finished(info := registry.get_job(job.id)):
            assert time.monotonic() < deadline, info
            time.sleep(0.05)
    finally:
        survivor.terminate()
        assert survivor.wait(30) == 0
    assert (info.state, info.attempts) == (JobState.SUCCEEDED, 2)
    assert [path.name for path in registry.layout.compositions.iterdir()] == [job.id]
    assert info.result.output_digest == registry.compose(parse_recipe("big+l"), tmp_path / "out").output_digest


def test_jobs_are_listed_newest_first_in_pages(jobs: JobService) -> None:
    """Each once."""
    ids = [jobs.submit(parse_recipe(f"base+a:{weight}")).id for weight in (1, 2, 3)]
    first = jobs.list(2, None)
    second = jobs.list(2, first.next)
    assert [job.id for job in (*first.items, *second.items)] == ids[::-1]
    assert second.next is None

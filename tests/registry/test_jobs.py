"""Composing on the service: submitted, polled, cancelled, taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from composer.errors import ConflictError, NotFoundError
from composer.recipe import parse_recipe
from registry.errors import JobNotFoundError
from registry.schemas import JobInfo, JobState
from registry.services.jobs import JobService
from registry.services.local import LocalRegistry
from tests.support import write_base, write_lora

MODULE = "model.layers.0.self_attn.q_proj"


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


@pytest.mark.parametrize(("step", "expected"), [("merging", JobState.SUCCEEDED), ("cancelling", JobState.CANCELLED)])
def test_a_job_of_a_dead_process_is_taken_up_unless_it_was_being_cancelled(
    jobs: JobService, registry: LocalRegistry, step: str, expected: JobState
) -> None:
    """What was running when the service died runs again; its half-written folder is removed."""
    job = jobs.submit(parse_recipe("base+a"))
    with registry.engine.begin() as connection:
        connection.execute(sa.text("UPDATE jobs SET state = 'running', step = :step"), {"step": step})
    leftover = registry.layout.compositions / f".{job.id}.dead.part"
    leftover.mkdir(parents=True)
    jobs.start()
    assert wait(jobs, job.id, finished).state is expected
    assert not leftover.exists()


def test_jobs_are_listed_newest_first_in_pages(jobs: JobService) -> None:
    """Each once."""
    ids = [jobs.submit(parse_recipe(f"base+a:{weight}")).id for weight in (1, 2, 3)]
    first = jobs.list(2, None)
    second = jobs.list(2, first.next)
    assert [job.id for job in (*first.items, *second.items)] == ids[::-1]
    assert second.next is None

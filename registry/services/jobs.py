"""Compositions on the service: queued in the database, run one at a time by a background thread.

    queued ──> running ──> succeeded | failed | cancelled

A job that was running when its process died is queued again at the next start: composing is idempotent.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
import uuid
from pathlib import Path

from sqlalchemy import select, tuple_, update

from composer.errors import ConflictError, TypedError
from composer.recipe import Recipe
from registry.db import session_scope
from registry.errors import JobNotFoundError
from registry.models import JobRow, now
from registry.schemas import CompositionInfo, JobInfo, JobState, Page
from registry.services.local import LocalRegistry

__all__ = ["JobService"]

log = logging.getLogger(__name__)
MAX_PAGE = 1000
POLL_S = 1.0
REPORT_S = 0.5
CANCELLING = "cancelling"


class JobCancelledError(TypedError):
    """Raised inside a run whose job was cancelled."""

    code = "job-cancelled"
    category = "conflict"


class JobService:
    """Submits, runs and reports jobs."""

    def __init__(self, registry: LocalRegistry) -> None:
        self._registry = registry
        self._engine = registry.engine
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._cancelled: set[str] = set()
        self._thread: threading.Thread | None = None

    def submit(self, recipe: Recipe) -> JobInfo:
        """Queue a compose. The recipe is planned first, so that what cannot work is refused at once."""
        self._registry.plan(recipe)
        row = JobRow(
            id=uuid.uuid4().hex, state=JobState.QUEUED.value, recipe=recipe.model_dump(mode="json"), step="queued"
        )
        with session_scope(self._engine, writes=True) as session:
            session.add(row)
            session.flush()
            info = job_info(row)
        self._wake.set()
        return info

    def get(self, job_id: str) -> JobInfo:
        """One job. Raises JobNotFoundError."""
        with session_scope(self._engine) as session:
            return job_info(_find(session.get(JobRow, job_id), job_id))

    def list(self, limit: int, cursor: str | None) -> Page[JobInfo]:
        """Jobs, newest first; the cursor is the id of the last one seen."""
        limit = max(1, min(limit, MAX_PAGE))
        query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit + 1)
        with session_scope(self._engine) as session:
            if cursor:
                last = _find(session.get(JobRow, cursor), cursor)
                query = query.where(tuple_(JobRow.created_at, JobRow.id) < tuple_(last.created_at, last.id))
            rows = list(session.scalars(query))
            items = tuple(job_info(row) for row in rows[:limit])
        return Page(items=items, next=items[-1].id if len(rows) > limit else None)

    def cancel(self, job_id: str) -> JobInfo:
        """Cancel a queued job at once, a running one at its next block; a finished one raises ConflictError."""
        with session_scope(self._engine, writes=True) as session:
            row = _find(session.get(JobRow, job_id), job_id)
            if row.state == JobState.QUEUED:
                row.state, row.finished_at, row.step = JobState.CANCELLED.value, now(), ""
            elif row.state == JobState.RUNNING:
                self._cancelled.add(job_id)
                row.step = CANCELLING
            else:
                raise ConflictError(
                    f"job {job_id} is {row.state}",
                    expected="a queued or running job",
                    found=row.state,
                    remedy="nothing is left to cancel",
                )
            return job_info(row)

    def files(self, job_id: str) -> dict[str, Path]:
        """The output of a succeeded job: file name to path."""
        info = self.get(job_id)
        if info.result is None:
            raise ConflictError(
                f"job {job_id} has no output: it is {info.state.value}",
                expected="succeeded",
                found=info.state.value,
                remedy="wait for it, or look at its error",
            )
        folder = self._registry.layout.compositions / job_id
        return {name: folder / name for name in (*info.result.record["outputs"], "composition.json")}

    def start(self) -> None:
        """Take up what was left and begin to work."""
        running = update(JobRow).where(JobRow.state == JobState.RUNNING.value)
        with session_scope(self._engine, writes=True) as session:
            session.execute(
                running.where(JobRow.step == CANCELLING).values(
                    state=JobState.CANCELLED.value, step="", finished_at=now()
                )
            )
            session.execute(running.values(state=JobState.QUEUED.value))
        for leftover in self._registry.layout.compositions.glob(".*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._stopping.clear()
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop at the next block; the running job is taken up at the next start."""
        self._stopping.set()
        self._wake.set()
        if self._thread:
            self._thread.join()

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                job_id = self._claim()
                if job_id:
                    self._run(job_id)
                    continue
            except Exception:
                log.exception("the job worker failed; it goes on")
            self._wake.wait(POLL_S)

    def _claim(self) -> str | None:
        with session_scope(self._engine, writes=True) as session:
            oldest = select(JobRow).where(JobRow.state == JobState.QUEUED.value).order_by(JobRow.created_at, JobRow.id)
            row = session.scalar(oldest.limit(1).with_for_update(skip_locked=True))
            if row is None:
                return None
            row.state = JobState.RUNNING.value
            return row.id

    def _run(self, job_id: str) -> None:
        recipe = self.get(job_id).recipe
        last = 0.0

        def progress(step: str, done: int, total: int) -> None:
            nonlocal last
            if job_id in self._cancelled or self._stopping.is_set():
                raise JobCancelledError(f"job {job_id} was cancelled", remedy="submit it again")
            if time.monotonic() - last > REPORT_S:
                last = time.monotonic()
                self._update(job_id, step=step, bytes_done=done, bytes_total=total)

        try:
            result = self._registry.compose(
                recipe, self._registry.layout.compositions / job_id, replace=True, progress=progress
            )
        except JobCancelledError:
            interrupted = job_id not in self._cancelled
            self._cancelled.discard(job_id)
            state = JobState.QUEUED if interrupted else JobState.CANCELLED
            self._update(job_id, state=state.value, step="", finished_at=None if interrupted else now())
        except TypedError as error:
            self._update(job_id, state=JobState.FAILED.value, step="", error=error.as_dict(), finished_at=now())
        except Exception:
            log.exception("job %s failed", job_id)
            error = TypedError("the job failed for a reason that was not foreseen", remedy="see the service's log")
            self._update(job_id, state=JobState.FAILED.value, step="", error=error.as_dict(), finished_at=now())
        else:
            stored = result.model_copy(update={"out": ""}).model_dump(mode="json")
            self._update(
                job_id, state=JobState.SUCCEEDED.value, step="", bytes_done=result.nbytes, bytes_total=result.nbytes,
                result=stored, finished_at=now(),
            )  # fmt: skip

    def _update(self, job_id: str, **values: object) -> None:
        with session_scope(self._engine, writes=True) as session:
            session.execute(update(JobRow).where(JobRow.id == job_id).values(**values))


def job_info(row: JobRow) -> JobInfo:
    """A row as a schema."""
    recipe = Recipe.model_validate(row.recipe)
    return JobInfo(
        id=row.id,
        state=JobState(row.state),
        recipe=recipe,
        recipe_text=str(recipe),
        step=row.step,
        bytes_done=row.bytes_done or 0,
        bytes_total=row.bytes_total or 0,
        error=row.error,
        result=CompositionInfo.model_validate(row.result) if row.result else None,
        created_at=row.created_at,
        finished_at=row.finished_at,
    )


def _find(row: JobRow | None, job_id: str) -> JobRow:
    if row is None:
        raise JobNotFoundError(f"no job {job_id!r}", expected="a job id", found=job_id, remedy="see GET /api/v1/jobs")
    return row

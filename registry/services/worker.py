"""Runs jobs: takes one under a lease, keeps the lease alive, writes down how far it is and how it ended.

    take      the oldest that is queued, or running under a lease that ran out (its worker was killed) or that is longer
              than any may be (the clock was set back since)
    beat      a thread renews the lease and learns of a cancel; progress does the same
    end       only by the worker whose lease it is: a worker that was thought dead changes nothing

Any number of workers share a database: `registry serve` has one, `registry worker` is one. Times are the workers' own
clocks: a lease is long against what clocks differ by.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import or_, select, update

from composer.errors import TypedError
from registry.access import LOCAL, Principal, Scope
from registry.db import session_scope
from registry.models import JobRow, now
from registry.schemas import JobState
from registry.services.job_kinds import KINDS, WITH_FILES

if TYPE_CHECKING:
    from registry.services.local import LocalRegistry

__all__ = ["LEASE_S", "Worker"]

log = logging.getLogger(__name__)
LEASE_S = 30.0
MAX_LEASE_S = 3600.0
POLL_S = 1.0
REPORT_S = 0.5
MAX_ATTEMPTS = 3
# It goes on elsewhere, and this attempt was nobody's fault.
GIVEN_BACK = {"state": JobState.QUEUED.value, "worker": None, "lease_until": None, "step": "",
              "attempts": JobRow.attempts - 1}  # fmt: skip


class JobStoppedError(TypedError):
    """Raised inside a run that must not go on: cancelled, interrupted by a shutdown, or its lease lost."""

    code = "job-cancelled"
    category = "conflict"


class _Run:
    """One job in one worker."""

    def __init__(self, worker: Worker, job_id: str) -> None:
        self._worker = worker
        self._job_id = job_id
        self._reported = 0.0
        self._stop: str | None = None
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, name=f"lease {job_id[:8]}", daemon=True)

    def progress(self, step: str, done: int, total: int) -> None:
        """Write it down now and then. Raises JobStoppedError when the job is to stop."""
        if self._worker.stopping.is_set():
            self._stop = self._stop or "interrupted"
        elif time.monotonic() - self._reported > REPORT_S:
            self._reported = time.monotonic()
            self._renew(step=step, bytes_done=done, bytes_total=total)
        if self._stop:
            raise JobStoppedError(f"job {self._job_id} was {self._stop}", remedy="submit it again")

    def run(self, kind: str, request: dict[str, Any], owner: str) -> None:
        """Do the work and write down how it ended."""
        started = time.monotonic()
        self._beats.start()
        ended: dict[str, Any] = {"finished_at": now()}
        # What its owner may do was asked when it was submitted; the audit log is to name the owner.
        principal = LOCAL if owner == LOCAL.subject else Principal(owner, frozenset({Scope.ADMIN}))
        try:
            result = KINDS[kind](self._worker.registry.acting_as(principal), self._job_id, request, self.progress)
        except JobStoppedError:
            if self._stop == "cancelled":
                ended["state"] = JobState.CANCELLED.value
            else:
                ended |= {**GIVEN_BACK, "finished_at": None}
        except TypedError as error:
            ended |= {"state": JobState.FAILED.value, "error": error.as_dict()}
        except Exception:
            log.exception("job %s failed", self._job_id)
            error = TypedError("the job failed for a reason that was not foreseen", remedy="see the service's log")
            ended |= {"state": JobState.FAILED.value, "error": error.as_dict()}
        else:
            nbytes = getattr(result, "nbytes", 0)
            ended |= {"state": JobState.SUCCEEDED.value, "result": result.model_dump(mode="json"),
                      "bytes_done": nbytes, "bytes_total": nbytes}  # fmt: skip
            if kind in WITH_FILES:
                ended["nbytes"] = nbytes
        finally:
            self._over.set()
            self._beats.join()
        ended["finished_at"] = ended["finished_at"] and now()
        ms, code = round((time.monotonic() - started) * 1000), ended.get("error", {}).get("code")
        fields = {"job": self._job_id, "kind": kind, "state": ended["state"], "subject": owner, "ms": ms, "error": code}
        log.info("job %s (%s) is %s", self._job_id, kind, ended["state"], extra={"fields": fields})
        if not self._write(**{"worker": None, "lease_until": None, "step": "", **ended}):
            log.warning("job %s went on elsewhere; what was done here is not counted", self._job_id)

    def _beat(self) -> None:
        while not self._over.wait(self._worker.lease_s / 4):
            try:
                self._renew()
            except TypedError:
                log.exception("the lease of job %s could not be renewed", self._job_id)

    def _renew(self, **values: Any) -> None:
        row = self._write(lease_until=now() + timedelta(seconds=self._worker.lease_s), **values)
        if row is None:
            self._stop = "taken over by another worker"
        elif row[0]:
            self._stop = "cancelled"

    def _write(self, **values: Any) -> Any:
        """Update the job if it is still ours; returns (cancelling,), or None when it is not."""
        mine = (JobRow.id == self._job_id, JobRow.worker == self._worker.name)
        with session_scope(self._worker.registry.engine, writes=True) as session:
            return session.execute(update(JobRow).where(*mine).values(**values).returning(JobRow.cancelling)).first()


class Worker:
    """Threads that run jobs until stopped."""

    def __init__(
        self, registry: LocalRegistry, *, slots: int = 1, lease_s: float = LEASE_S, wake: threading.Event | None = None
    ) -> None:
        self.registry = registry
        self.lease_s = lease_s
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.stopping = threading.Event()
        self._wake = wake or threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"jobs {index}", daemon=True) for index in range(slots)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float | None = None) -> bool:
        """Stop at the next block; what was running is queued again. Returns whether all threads ended.

        A thread that is deep in a long step for more than `seconds` is left behind, and may write nothing any more: its
        job is given back, and the process should end.
        """
        self.stopping.set()
        self._wake.set()
        deadline = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            return True
        log.warning("a running job did not stop in time; it is given back")
        with session_scope(self.registry.engine, writes=True) as session:
            mine = (JobRow.worker == self.name, JobRow.state == JobState.RUNNING.value)
            session.execute(update(JobRow).where(*mine).values(**GIVEN_BACK))
        return False

    def drain(self) -> None:
        """Run what waits in this thread, and return when nothing does."""
        while not self.stopping.is_set() and self._run_one():
            pass

    def _work(self) -> None:
        while not self.stopping.is_set():
            self._wake.clear()
            try:
                if self._run_one():
                    continue
            except Exception:
                log.exception("a job worker failed; it goes on")
            self._wake.wait(POLL_S)

    def _run_one(self) -> bool:
        taken = self._take()
        if taken is None:
            return False
        _Run(self, taken[0]).run(*taken[1:])
        return True

    def _take(self) -> tuple[str, str, dict[str, Any], str] | None:
        """Lease the oldest job there is to run. Late ones that may not run again are ended on the way."""
        longest = now() + timedelta(seconds=MAX_LEASE_S)
        over = or_(JobRow.lease_until < now(), JobRow.lease_until > longest)
        late = (JobRow.state == JobState.RUNNING.value) & over
        waiting = JobRow.state == JobState.QUEUED.value
        query = select(JobRow).where(or_(waiting, late), JobRow.kind.in_(list(KINDS)))
        query = query.order_by(JobRow.created_at, JobRow.id)
        while True:
            with session_scope(self.registry.engine, writes=True) as session:
                row = session.scalar(query.limit(1).with_for_update(skip_locked=True))
                if row is None:
                    return None
                if row.cancelling:
                    row.state, row.finished_at = JobState.CANCELLED.value, now()
                elif row.attempts >= MAX_ATTEMPTS:
                    error = TypedError(
                        f"its worker died {row.attempts} times", expected="a worker that survives it",
                        found=f"{row.attempts} attempts", remedy="look at memory and logs, then 'registry jobs retry'",
                    )  # fmt: skip
                    row.state, row.finished_at, row.error = JobState.FAILED.value, now(), error.as_dict()
                else:
                    row.state, row.attempts, row.worker = JobState.RUNNING.value, row.attempts + 1, self.name
                    row.lease_until = now() + timedelta(seconds=self.lease_s)
                    row.started_at = row.started_at or now()
                    return row.id, row.kind, row.request, row.owner
                row.worker, row.lease_until, row.step = None, None, ""

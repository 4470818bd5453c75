"""The queue of jobs: submitted, looked at, cancelled and retried here; worker.py runs them.

    queued ──> running ──> succeeded | failed | cancelled
      ^           │  its lease ran out: the worker is gone         retry: failed, cancelled ──> queued
      └───────────┘

One key, one job: a compose whose recipe and inputs are those of a job that waits, runs or succeeded is that job.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select, tuple_
from sqlalchemy.exc import IntegrityError as DatabaseIntegrityError
from sqlalchemy.orm import Session

from composer.errors import ConflictError, NotFoundError
from composer.recipe import Recipe, split_reference
from registry.access import LOCAL, Principal, Role, Scope
from registry.db import session_scope
from registry.errors import DiskLimitError, ForbiddenError, JobNotFoundError, QueueFullError
from registry.lifecycle import require_usable
from registry.models import JobRow, now
from registry.names import adapter_name
from registry.schemas import CompositionInfo, ConversionInfo, DeltaInfo, JobInfo, JobState, Page, Relation
from registry.services.composed import require_publication
from registry.services.importing import ImportRules, hub_reference
from registry.services.job_kinds import WITH_FILES
from registry.services.lifecycle import refuse_quarantined
from registry.services.namespaces import require_role

if TYPE_CHECKING:
    from registry.services.local import LocalRegistry

__all__ = ["JobLimits", "JobService", "job_info"]

MAX_PAGE = 1000
ACTIVE = (JobState.QUEUED.value, JobState.RUNNING.value)
RETRIABLE = (JobState.FAILED.value, JobState.CANCELLED.value)
RECORD = "composition.json"
BASES = {"finetune", "base"}  # fields of a conversion's request


@dataclass(frozen=True, slots=True)
class JobLimits:
    """What jobs may take. `disk_bytes`: of all compositions on the service, kept, running and queued."""

    queued: int = 1000
    disk_bytes: int | None = None
    free_bytes: int = 512 << 20


class JobService:
    """Submits and reports jobs, and runs them in `slots` threads of this process once started."""

    def __init__(
        self,
        registry: LocalRegistry,
        *,
        limits: JobLimits | None = None,
        slots: int = 1,
        imports: ImportRules | None = None,
    ) -> None:
        self._registry = registry
        self._engine = registry.engine
        self._limits = limits or JobLimits()
        self._slots = slots
        self._imports = imports or ImportRules()
        self.wake = threading.Event()
        self._worker: Any = None
        self._principal = LOCAL

    def acting_as(self, principal: Principal) -> JobService:
        """The same queue as `principal` may see and change it."""
        return self.over(self._registry.acting_as(principal), principal)

    def over(self, registry: LocalRegistry, principal: Principal) -> JobService:
        """The same queue over the registry as `principal` sees it."""
        other = copy.copy(self)
        other._registry, other._principal = registry, principal
        return other

    def submit(self, recipe: Recipe, *, accept_licences: bool = False, probe: str | None = None) -> JobInfo:
        """Queue a compose, or name the job that does or did the very same.

        It is planned first, so that what cannot work is refused at once, and its versions are pinned: an alias that
        moves while the job waits changes nothing.
        """
        prepared = self._registry.prepare(recipe, accept_licences=accept_licences, probe=probe)
        request = {"recipe": recipe.model_dump(mode="json"), "pins": list(prepared.pins),
                   "accept_licences": accept_licences, "probe": probe}  # fmt: skip
        return self.enqueue("compose", str(recipe), request, key=prepared.key, nbytes=prepared.plan.nbytes)

    def submit_base(
        self,
        folder: Path,
        name: str | None,
        parent: str | None = None,
        relation: Relation | None = None,
        license: str | None = None,
    ) -> JobInfo:
        """Queue the fingerprinting and registration of a checkpoint folder."""
        self._principal.require_everywhere(Scope.PUBLISH)
        request = {"folder": str(folder.expanduser().resolve()), "name": name, "parent": parent,
                   "relation": relation and relation.value, "license": license}  # fmt: skip
        key = hashlib.sha256(json.dumps(["base", request], sort_keys=True).encode()).hexdigest()
        return self.enqueue("base", name or folder.name, request, key=key, reuse=False)

    def submit_import(
        self,
        ref: str,
        *,
        name: str | None = None,
        version: str | None = None,
        base: str | None = None,
        max_bytes: int | None = None,
        allow_private: bool = False,
    ) -> JobInfo:
        """Queue an import under the service's rules. Its owner must be allowed to make here what it turns out to be."""
        place = hub_reference(ref)
        name = name or place.repository
        self._principal.require(Scope.PUBLISH)
        limit = self._imports.max_bytes if max_bytes is None else max_bytes
        self._imports.check(limit, allow_private)
        refused = "base" if self._principal.namespaces is not None else None
        try:
            with session_scope(self._registry.engine, writes=True) as session:
                require_role(session, adapter_name(name)[0], Role.PUBLISHER, claim=True)
        except ForbiddenError:
            if refused:
                raise
            refused = "adapter"
        request = {"ref": ref, "name": name, "version": version, "base": base, "max_bytes": limit,
                   "allow_private": allow_private, "token": self._imports.token, "refused": refused}  # fmt: skip
        key = hashlib.sha256(json.dumps(["import", request], sort_keys=True).encode()).hexdigest()
        return self.enqueue("import", f"{name} = {ref}", request, key=key, reuse=False)

    def submit_verify(self, base: str) -> JobInfo:
        """Queue a new look at every tensor of a registered base."""
        info = self._registry.get_base(base)
        key = hashlib.sha256(f"verify {info.fingerprint}".encode()).hexdigest()
        return self.enqueue("verify", info.name, {"base": info.fingerprint}, key=key, reuse=False)

    def submit_publication(self, job_id: str, name: str) -> JobInfo:
        """Queue that what a compose made becomes a base or an adapter. Raises ConflictError for a job without."""
        info = self.get(job_id)
        self.files(job_id)
        if not isinstance(info.result, CompositionInfo):
            raise ConflictError(
                f"job {job_id} composed nothing", expected="a compose that succeeded", found=info.kind,
                remedy="see 'registry jobs list'",
            )  # fmt: skip
        with session_scope(self._registry.engine, writes=True) as session:
            require_publication(session, name, info.result.export)
        key = hashlib.sha256(json.dumps(["publication", job_id, name]).encode()).hexdigest()
        request = {"job": job_id, "name": name}
        return self.enqueue("publication", f"{name} = {info.title}", request, key=key, reuse=False)

    def submit_conversion(self, kind: str, request: Mapping[str, Any]) -> JobInfo:
        """Queue an extract, resize, delta or restore: `request` holds the parameters of the registry's method.

        Bases and adapters are looked up first; an adapter is pinned to the digest that its name means now.
        """
        pinned, content = dict(request), dict(request)
        for field in BASES & request.keys():
            content[field] = self._registry.get_base(request[field]).fingerprint
        if "ref" in request:
            info = self._registry.get_version(request["ref"])
            require_usable(info, f"{info.name}@{info.version}", split_reference(request["ref"])[1])
            pinned["ref"], content["ref"] = f"{info.name}@{info.digest}", info.digest
        key = hashlib.sha256(json.dumps([kind, content], sort_keys=True).encode()).hexdigest()
        title = " ".join(str(request[field]) for field in ("finetune", "ref", "base") if field in request)
        return self.enqueue(kind, f"{kind} {title}", pinned, key=key)

    def enqueue(
        self, kind: str, title: str, request: dict[str, Any], *, key: str | None, nbytes: int = 0, reuse: bool = True
    ) -> JobInfo:
        """Add a job, unless one with the same `key` waits, runs or, with `reuse`, succeeded.

        Raises QueueFullError and DiskLimitError.
        """
        try:
            with session_scope(self._engine, writes=True) as session:
                row = self._same(session, key, reuse=reuse)
                if row is None:
                    self._check_limits(session, nbytes)
                    row = JobRow(
                        id=uuid.uuid4().hex, kind=kind, title=title, key=key, state=JobState.QUEUED.value,
                        request=request, bytes_total=nbytes, nbytes=nbytes, owner=self._principal.subject,
                    )  # fmt: skip
                    session.add(row)
                    session.flush()
                info = job_info(row)
        except DatabaseIntegrityError:  # another process was first: its job is ours
            with session_scope(self._engine) as session:
                same = self._same(session, key, reuse=reuse)
                if same is None:
                    raise
                info = job_info(same)
        self.wake.set()
        return info

    def _same(self, session: Session, key: str | None, *, reuse: bool) -> JobRow | None:
        if key is None:
            return None
        states = (*ACTIVE, JobState.SUCCEEDED.value) if reuse else ACTIVE
        query = select(JobRow).where(JobRow.key == key, JobRow.state.in_(states))
        for row in session.scalars(query.order_by(JobRow.created_at.desc(), JobRow.id.desc())):
            if row.state in ACTIVE or (self._registry.layout.compositions / row.id).is_dir():
                return row
        return None

    def _check_limits(self, session: Session, nbytes: int) -> None:
        queued = session.scalar(select(func.count()).where(JobRow.state == JobState.QUEUED.value)) or 0
        if queued >= self._limits.queued:
            raise QueueFullError(
                f"{queued} jobs are waiting already",
                expected=f"fewer than {self._limits.queued}",
                found=queued,
                remedy="try again later, or run another 'registry worker'",
            )
        if not nbytes:
            return
        kept = (*ACTIVE, JobState.SUCCEEDED.value)
        used = session.scalar(select(func.sum(JobRow.nbytes)).where(JobRow.state.in_(kept))) or 0
        if self._limits.disk_bytes is not None and used + nbytes > self._limits.disk_bytes:
            raise DiskLimitError(
                f"this composition needs {nbytes} bytes; {used} of {self._limits.disk_bytes} are taken",
                expected=f"at most {self._limits.disk_bytes} bytes of compositions",
                found=used + nbytes,
                remedy="remove old ones with 'registry gc', or raise --max-disk",
            )
        free = shutil.disk_usage(self._registry.home).free
        if free - nbytes < self._limits.free_bytes:
            raise DiskLimitError(
                f"this composition needs {nbytes} bytes; {free} are free",
                expected=f"{self._limits.free_bytes} bytes left free",
                found=free - nbytes,
                remedy="free some space, or remove old compositions with 'registry gc'",
            )

    def get(self, job_id: str) -> JobInfo:
        """One job. Raises JobNotFoundError."""
        with session_scope(self._engine) as session:
            return job_info(self._find(session, job_id))

    def list(self, limit: int, cursor: str | None, state: JobState | None = None) -> Page[JobInfo]:
        """Jobs, newest first; the cursor is the id of the last one seen."""
        limit = max(1, min(limit, MAX_PAGE))
        query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit + 1)
        if state is not None:
            query = query.where(JobRow.state == state.value)
        if not self._principal.is_admin:
            query = query.where(JobRow.owner == self._principal.subject)
        with session_scope(self._engine) as session:
            if cursor:
                last = self._find(session, cursor)
                query = query.where(tuple_(JobRow.created_at, JobRow.id) < tuple_(last.created_at, last.id))
            rows = list(session.scalars(query))
            items = tuple(job_info(row) for row in rows[:limit])
        return Page(items=items, next=items[-1].id if len(rows) > limit else None)

    def counts(self) -> dict[JobState, int]:
        """How many jobs there are in each state, whoever submitted them."""
        query = select(JobRow.state, func.count()).group_by(JobRow.state)
        with session_scope(self._engine) as session:
            found = dict(session.execute(query).tuples().all())
        return {state: found.get(state.value, 0) for state in JobState}

    def cancel(self, job_id: str) -> JobInfo:
        """Cancel a queued job at once, a running one when its worker next looks; a finished one is a ConflictError."""
        with session_scope(self._engine, writes=True) as session:
            row = self._find(session, job_id, change=True)
            if row.state == JobState.QUEUED:
                row.state, row.finished_at, row.step = JobState.CANCELLED.value, now(), ""
            elif row.state == JobState.RUNNING:
                row.cancelling = True
            else:
                raise ConflictError(
                    f"job {job_id} is {row.state}",
                    expected="a queued or running job",
                    found=row.state,
                    remedy="nothing is left to cancel",
                )
            session.flush()
            return job_info(row)

    def retry(self, job_id: str) -> JobInfo:
        """Queue a failed or cancelled job again. Raises ConflictError for others, and where its key is at work."""
        try:
            with session_scope(self._engine, writes=True) as session:
                row = self._find(session, job_id, change=True)
                if row.state not in RETRIABLE:
                    raise ConflictError(
                        f"job {job_id} is {row.state}",
                        expected="a failed or cancelled job",
                        found=row.state,
                        remedy="cancel it first, or submit the recipe again",
                    )
                self._check_limits(session, row.nbytes)
                row.state, row.attempts, row.cancelling = JobState.QUEUED.value, 0, False
                row.error, row.finished_at, row.bytes_done, row.step = None, None, 0, ""
                session.flush()
                info = job_info(row)
        except DatabaseIntegrityError:
            raise ConflictError(
                f"the same work as job {job_id} waits or runs already",
                expected="one job a recipe",
                found="another job of the same inputs",
                remedy="see 'registry jobs list'",
            ) from None
        self.wake.set()
        return info

    def _find(self, session: Session, job_id: str, *, change: bool = False) -> JobRow:
        """A job that the principal may see: its own, or a compose of adapters that it may see. Others do not exist.

        change: lock it; only its owner and admins may. Raises JobNotFoundError and ForbiddenError.
        """
        row = session.get(JobRow, job_id, with_for_update=change)
        if row is None or not self._may_see(row):
            raise JobNotFoundError(
                f"no job {job_id!r}", expected="a job id", found=job_id, remedy="see 'registry jobs list'"
            )
        if change and not self._owns(row):
            raise ForbiddenError(
                f"job {job_id} was submitted by somebody else",
                expected=row.owner,
                found=self._principal.subject,
                remedy="ask an admin",
            )
        return row

    def _owns(self, row: JobRow) -> bool:
        return self._principal.is_admin or row.owner == self._principal.subject

    def _may_see(self, row: JobRow) -> bool:
        if self._owns(row):
            return True
        if row.kind != "compose":
            return False
        try:
            for term in Recipe.model_validate(row.request["recipe"]).adapters:
                self._registry.get_version(term.ref)
        except NotFoundError:
            return False
        return True

    def files(self, job_id: str) -> dict[str, Path]:
        """The output of a composition or a conversion that succeeded: file name to path."""
        info = self.get(job_id)
        folder = self._registry.layout.compositions / job_id
        result = info.result
        if not isinstance(result, CompositionInfo | ConversionInfo | DeltaInfo) or not folder.is_dir():
            found = f"{info.kind}, {info.state.value}" + (", collected" if result and info.kind in WITH_FILES else "")
            raise ConflictError(
                f"job {job_id} has no output: it is {found}",
                expected="a composition or conversion that succeeded",
                found=found,
                remedy="wait for it, look at its error, or submit it again",
            )
        if not isinstance(result, CompositionInfo):
            self._refuse_quarantined(job_id)
            return {file.name: folder / file.name for file in result.files}
        with session_scope(self._engine) as session:
            for entry in result.record["adapters"]:
                refuse_quarantined(session, entry["digest"], f"job {job_id}: {entry['ref']}")
        return {name: folder / name for name in (*result.record["outputs"], RECORD)}

    def _refuse_quarantined(self, job_id: str) -> None:
        """The adapter that a conversion read, if it read one."""
        with session_scope(self._engine) as session:
            ref = self._find(session, job_id).request.get("ref")
            if ref is not None:
                refuse_quarantined(session, ref.partition("@")[2], f"job {job_id}: {ref}")

    def start(self) -> None:
        """Begin to work in this process."""
        if self._slots:
            from registry.services.worker import Worker

            self._worker = Worker(self._registry, slots=self._slots, wake=self.wake)
            self._worker.start()

    def stop(self, seconds: float | None = None) -> bool:
        """Stop at the next block; what was running is queued again. Returns whether that was within `seconds`."""
        return self._worker is None or self._worker.stop(seconds)


def job_info(row: JobRow) -> JobInfo:
    """A row as a schema."""
    stopping = row.cancelling and row.state == JobState.RUNNING
    return JobInfo(
        id=row.id,
        kind=row.kind,
        title=row.title,
        owner=row.owner,
        state=JobState(row.state),
        recipe=Recipe.model_validate(row.request["recipe"]) if row.kind == "compose" else None,
        step="cancelling" if stopping else row.step,
        bytes_done=row.bytes_done,
        bytes_total=row.bytes_total,
        attempts=row.attempts,
        error=row.error,
        result=row.result,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )

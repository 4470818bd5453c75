"""Imports and other jobs: how far they are (asked for or sent), cancel, retry, the files of a composition."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from composer.errors import NotFoundError
from composer.provenance import record_file
from composer.sinks import storage_errors
from registry.access import Scope
from registry.api.deps import DEFAULT_LIMIT, Cursor, Jobs, Limit, file_response, require
from registry.api.rules import refuse_path
from registry.api.schemas import ImportRequest, PublicationRequest
from registry.schemas import CompositionInfo, ConversionInfo, DeltaInfo, FileInfo, JobInfo, JobState, Page

router = APIRouter(tags=["jobs"])

COMPOSE = [Depends(require(Scope.COMPOSE))]
LOOK_S = 0.25
KEEP_ALIVE_S = 15.0
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "events `job`, then `end`",
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "event": {"enum": ["job", "end"]},
                        "data": {"type": "string", "contentMediaType": "application/json"},
                    },
                }
            }
        },
    }
}


@router.post("/imports", summary="Import from a hub", status_code=202, dependencies=[Depends(require(Scope.PUBLISH))])
def import_model(body: ImportRequest, response: Response, jobs: Jobs) -> JobInfo:
    """Queue a job that fetches an adapter or a base, checks it and publishes it here; Location names it."""
    for what, ref in (("the name", body.name), ("the base", body.base)):
        if ref is not None:
            refuse_path(ref, what)
    job = jobs.submit_import(**body.model_dump())
    response.headers["Location"] = f"/api/v1/jobs/{job.id}"
    return job


@router.get("/jobs", summary="List jobs")
def list_jobs(
    jobs: Jobs,
    state: Annotated[JobState | None, Query(description="only those in this state")] = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Page[JobInfo]:
    """Jobs, newest first."""
    return jobs.list(limit, cursor, state)


@router.get("/jobs/{job_id}", summary="Show a job")
def get_job(job_id: str, jobs: Jobs) -> JobInfo:
    """Its state, how far it is, and its result or its error."""
    return jobs.get(job_id)


@router.get("/jobs/{job_id}/events", summary="Follow a job", response_class=StreamingResponse, responses=EVENTS)
def follow(job_id: str, request: Request, jobs: Jobs) -> StreamingResponse:
    """Server-sent events: `job` with the job as JSON whenever it changed, `end` with it once it is over."""
    return StreamingResponse(
        _events(request, jobs, jobs.get(job_id)),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _events(request: Request, jobs: Jobs, job: JobInfo) -> AsyncIterator[str]:
    sent, quiet = "", 0.0
    while True:
        over = job.state not in (JobState.QUEUED, JobState.RUNNING)
        text = job.model_dump_json()
        if over or text != sent:
            yield f"event: {'end' if over else 'job'}\ndata: {text}\n\n"
            sent, quiet = text, 0.0
        elif quiet >= KEEP_ALIVE_S:
            yield ": still there\n\n"
            quiet = 0.0
        if over or request.app.state.closing.is_set() or await request.is_disconnected():
            return
        await asyncio.sleep(LOOK_S)
        quiet += LOOK_S
        job = await run_in_threadpool(jobs.get, job.id)


@router.delete("/jobs/{job_id}", summary="Cancel a job", dependencies=COMPOSE)
def cancel(job_id: str, jobs: Jobs) -> JobInfo:
    """Stop a job that is queued or running; the answer is the job as it is then."""
    return jobs.cancel(job_id)


@router.post("/jobs/{job_id}/retry", summary="Retry a job", dependencies=COMPOSE)
def retry(job_id: str, jobs: Jobs) -> JobInfo:
    """Queue a failed or cancelled job again."""
    return jobs.retry(job_id)


@router.post(
    "/jobs/{job_id}/publication",
    summary="Publish a composition",
    status_code=202,
    dependencies=[Depends(require(Scope.PUBLISH))],
)
def publish(job_id: str, body: PublicationRequest, response: Response, jobs: Jobs) -> JobInfo:
    """Queue a job that makes what a compose made a base, or an adapter (export peft), for all who load by name."""
    job = jobs.submit_publication(job_id, refuse_path(body.name, "the name"))
    response.headers["Location"] = f"/api/v1/jobs/{job.id}"
    return job


@router.get("/jobs/{job_id}/files", summary="List a job's files")
def list_files(job_id: str, jobs: Jobs) -> Page[FileInfo]:
    """The files of a composition or conversion that succeeded."""
    recorded = _recorded(jobs.get(job_id))
    files = sorted(jobs.files(job_id).items())
    with storage_errors("listing the files of a composition"):
        return Page[FileInfo](items=tuple(_describe(name, path, recorded) for name, path in files))


@router.get("/jobs/{job_id}/files/{filename:path}", summary="Download a file of a job", response_class=Response)
def download(request: Request, job_id: str, filename: str, jobs: Jobs) -> Response:
    """One file; its ETag is the sha256 of its bytes."""
    job = jobs.get(job_id)
    files = jobs.files(job_id)
    if filename not in files:
        raise NotFoundError(f"job {job_id} has no file {filename!r}", expected=sorted(files), found=filename)
    entry = _describe(filename, files[filename], _recorded(job))
    return file_response(request, files[filename], filename, entry.sha256)


def _recorded(job: JobInfo) -> dict[str, Any]:
    if isinstance(job.result, CompositionInfo):
        record = job.result.record
        own = {"sha256": hashlib.sha256(record_file(record)).hexdigest()}
        return {**record.get("outputs", {}), "composition.json": own}
    files = job.result.files if isinstance(job.result, ConversionInfo | DeltaInfo) else ()
    return {file.name: {"sha256": file.sha256} for file in files}


def _describe(name: str, path: Path, recorded: dict[str, Any]) -> FileInfo:
    return FileInfo(name=name, size=path.stat().st_size, sha256=recorded[name]["sha256"])

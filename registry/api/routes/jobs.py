"""Jobs: how far a compose is, and its files once it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from composer.errors import NotFoundError
from composer.files import sha256_file
from composer.sinks import storage_errors
from registry.api.deps import DEFAULT_LIMIT, Cursor, Jobs, Limit, file_response
from registry.schemas import FileInfo, JobInfo, Page

router = APIRouter(tags=["jobs"])


@router.get("/jobs", summary="List jobs")
def list_jobs(jobs: Jobs, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None) -> Page[JobInfo]:
    """Jobs, newest first."""
    return jobs.list(limit, cursor)


@router.get("/jobs/{job_id}", summary="Show a job")
def get_job(job_id: str, jobs: Jobs) -> JobInfo:
    """Its state, how far it is, and its result or its error."""
    return jobs.get(job_id)


@router.delete("/jobs/{job_id}", summary="Cancel a job")
def cancel(job_id: str, jobs: Jobs) -> JobInfo:
    """Stop a job that is queued or running; the answer is the job as it is then."""
    return jobs.cancel(job_id)


@router.get("/jobs/{job_id}/files", summary="List a job's files")
def list_files(job_id: str, jobs: Jobs) -> Page[FileInfo]:
    """The files of a job that succeeded."""
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
    return job.result.record.get("outputs", {}) if job.result else {}


def _describe(name: str, path: Path, recorded: dict[str, Any]) -> FileInfo:
    sha256 = recorded[name]["sha256"] if name in recorded else sha256_file(path)
    return FileInfo(name=name, size=path.stat().st_size, sha256=sha256)

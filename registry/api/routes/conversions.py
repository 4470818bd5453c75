"""LoRAs made of other things and fine-tunes as differences: jobs over registered bases and adapters.

Their files are fetched like those of a composition, from /jobs/{id}/files. Undo needs no route of its own: it composes
what the record at the client names.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Response

from registry.access import Scope
from registry.api.deps import Jobs, require
from registry.api.rules import refuse_path
from registry.api.schemas import DeltaRequest, ExtractRequest, ResizeRequest, RestoreRequest
from registry.schemas import JobInfo

router = APIRouter(tags=["conversions"], dependencies=[Depends(require(Scope.COMPOSE))])


@router.post("/conversions/extract", summary="Extract a LoRA", status_code=202)
def extract(body: ExtractRequest, response: Response, jobs: Jobs) -> JobInfo:
    """Queue a job that extracts a LoRA from a fine-tune, both registered; the same request again is the same job."""
    return _queued("extract", body, response, jobs)


@router.post("/conversions/resize", summary="Resize a LoRA", status_code=202)
def resize(body: ResizeRequest, response: Response, jobs: Jobs) -> JobInfo:
    """Queue a job that brings a registered LoRA to another rank."""
    return _queued("resize", body, response, jobs)


@router.post("/conversions/delta", summary="Make a delta", status_code=202)
def make_delta(body: DeltaRequest, response: Response, jobs: Jobs) -> JobInfo:
    """Queue a job that stores one registered base as its exact difference from another."""
    return _queued("delta", body, response, jobs)


@router.post("/conversions/restore", summary="Restore from a delta", status_code=202)
def restore_delta(body: RestoreRequest, response: Response, jobs: Jobs) -> JobInfo:
    """Queue a job that writes the checkpoint that a published difference was made of, every byte."""
    return _queued("restore", body, response, jobs)


def _queued(
    kind: str, body: ExtractRequest | ResizeRequest | DeltaRequest | RestoreRequest, response: Response, jobs: Any
) -> JobInfo:
    request = body.model_dump()
    for field in ("finetune", "base"):
        if field in request:
            refuse_path(request[field], f"the {field}")
    if "ref" in request:
        refuse_path(request["ref"], "the adapter")
    job: JobInfo = jobs.submit_conversion(kind, request)
    response.headers["Location"] = f"/api/v1/jobs/{job.id}"
    return job

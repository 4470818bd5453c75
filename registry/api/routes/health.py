"""Whether the service answers, whether it can serve, what it counted, and whether everything is in place."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from registry import __version__
from registry.access import Scope
from registry.api.deps import Registered, require
from registry.api.metrics import CONTENT_TYPE
from registry.api.schemas import CollectRequest, DoctorReport, Health
from registry.schemas import Collected, Readiness, StoreCheck

router = APIRouter(tags=["service"])
ADMIN = [Depends(require(Scope.ADMIN, everywhere=True))]
outside = APIRouter(tags=["service"])


NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Readiness, "description": "Not now"}}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}, "description": "Prometheus's text format"}
}


@outside.get("/healthz", summary="Does the service answer?", include_in_schema=False)
@outside.get("/api/v1/health", summary="Does the service answer?")
def healthz() -> Health:
    """Ask nothing of the database or the store."""
    return Health(version=__version__)


@outside.get("/api/v1/ready", summary="Can the service serve?", responses=NOT_READY)
def ready(request: Request, response: Response) -> Readiness:
    """Database, migrations and store; 503 where one of them fails, and once the service is shutting down."""
    found: Readiness = request.app.state.registry.readiness()
    if request.app.state.closing.is_set():
        found = found.model_copy(update={"ready": False})
    response.status_code = 200 if found.ready else 503
    return found


@outside.get(
    "/metrics",
    summary="What Prometheus scrapes",
    response_class=Response,
    responses=METRICS,
    dependencies=[Depends(require(Scope.READ))],
)
def metrics(request: Request) -> Response:
    """Requests, latencies, bytes, jobs by state, downloads and the process itself. No label holds a name."""
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE)


@router.post("/collections", summary="Remove what nothing names", dependencies=ADMIN)
def collect(body: CollectRequest, registry: Registered) -> Collected:
    """Stored files, uploads and outputs that are old enough; with `dry_run`, only counted."""
    return registry.collect(**body.model_dump())


@router.post("/store/checks", summary="Hash everything that is stored", dependencies=ADMIN)
def check_store(registry: Registered, repair: bool = False) -> StoreCheck:
    """Name what is damaged; with `repair`, restore it where a copy is left. It takes as long as reading all of it."""
    return registry.verify_store(repair=repair)


@router.get("/doctor", summary="Is everything in place?", dependencies=[Depends(require(Scope.ADMIN))])
def doctor(registry: Registered) -> DoctorReport:
    """Run the checks of `registry doctor` on the service."""
    checks = registry.doctor()
    return DoctorReport(ok=all(check.ok for check in checks), checks=checks)

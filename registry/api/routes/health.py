"""Whether the service answers, and whether everything is in place."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from registry import __version__
from registry.access import Scope
from registry.api.deps import Registered, require
from registry.api.schemas import CollectRequest, DoctorReport, Health
from registry.schemas import Collected

router = APIRouter(tags=["service"])
ADMIN = [Depends(require(Scope.ADMIN, everywhere=True))]
outside = APIRouter(tags=["service"])


@outside.get("/healthz", summary="Does the service answer?")
def healthz() -> Health:
    """Ask nothing of the database or the store."""
    return Health(version=__version__)


@router.post("/collections", summary="Remove what nothing names", dependencies=ADMIN)
def collect(body: CollectRequest, registry: Registered) -> Collected:
    """Stored files, uploads and outputs that are old enough; with `dry_run`, only counted."""
    return registry.collect(**body.model_dump())


@router.get("/doctor", summary="Is everything in place?", dependencies=[Depends(require(Scope.ADMIN))])
def doctor(registry: Registered) -> DoctorReport:
    """Run the checks of `registry doctor` on the service."""
    checks = registry.doctor()
    return DoctorReport(ok=all(check.ok for check in checks), checks=checks)

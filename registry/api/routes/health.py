"""Whether the service answers, and whether everything is in place."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from registry import __version__
from registry.access import Scope
from registry.api.deps import Registered, require
from registry.api.schemas import DoctorReport, Health

router = APIRouter(tags=["service"])
outside = APIRouter(tags=["service"])


@outside.get("/healthz", summary="Does the service answer?")
def healthz() -> Health:
    """Ask nothing of the database or the store."""
    return Health(version=__version__)


@router.get("/doctor", summary="Is everything in place?", dependencies=[Depends(require(Scope.ADMIN))])
def doctor(registry: Registered) -> DoctorReport:
    """Run the checks of `registry doctor` on the service."""
    checks = registry.doctor()
    return DoctorReport(ok=all(check.ok for check in checks), checks=checks)

"""The FastAPI application: everything under /api/v1, health outside, failures in one shape.

GET  /healthz
POST GET      /api/v1/bases                         GET /bases/{[namespace/]name}   …/adapters   …/inspect
POST GET      /api/v1/adapters                      GET /search   /check
GET           /api/v1/adapters/{namespace}/{name}   …/versions   …/bases   …/inspect   …/files/{filename}
PUT DELETE    /api/v1/adapters/{namespace}/{name}/aliases/{alias}
POST          /api/v1/plans   /compositions
GET DELETE    /api/v1/jobs/{id}                     GET /jobs   /jobs/{id}/files   /jobs/{id}/files/{filename}
GET           /api/v1/doctor
              /api/models   /api/repos   /{repository}/resolve    the Hub's protocol (registry/api/hub)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from registry import __version__
from registry.api.failures import RESPONSES, add_handlers
from registry.api.guard import SameOrigin
from registry.api.hub import lfs, listing, reading, repos, writing, xet
from registry.api.hub.signing import Signer
from registry.api.routes import adapters, bases, compositions, health
from registry.api.routes import jobs as job_routes

if TYPE_CHECKING:
    from registry.services.jobs import JobService
    from registry.services.local import LocalRegistry

__all__ = ["MAX_UPLOAD_BYTES", "create_app"]

MAX_UPLOAD_BYTES = 64 << 30
PREFIX = "/api/v1"
STOP_S = 10.0

log = logging.getLogger(__name__)


def create_app(
    registry: LocalRegistry,
    jobs: JobService,
    *,
    max_upload_bytes: int = MAX_UPLOAD_BYTES,
    hosts: frozenset[str] | None = None,
) -> FastAPI:
    """The service over a registry. The worker of `jobs` runs as long as the application does.

    hosts: names that the service answers for; None is any.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(jobs.start)
        try:
            yield
        finally:
            app.state.left_behind = not await run_in_threadpool(_stop, jobs)

    app = FastAPI(
        title="Adapter registry",
        summary="Adapters tied to their base models by hash, and models composed from them",
        version=__version__,
        lifespan=lifespan,
        docs_url=f"{PREFIX}/docs",
        redoc_url=None,
        openapi_url=f"{PREFIX}/openapi.json",
        responses=RESPONSES,
    )
    app.state.registry = registry
    app.state.jobs = jobs
    app.state.max_upload_bytes = max_upload_bytes
    app.state.left_behind = False
    app.state.signer = Signer()
    app.add_middleware(SameOrigin, hosts=hosts)
    add_handlers(app)
    for module in (bases, adapters, compositions, job_routes, health):
        app.include_router(module.router, prefix=PREFIX)
    app.include_router(health.outside)
    for module in (lfs, xet, listing, repos, writing, reading):
        app.include_router(module.router)
    return app


def _stop(jobs: JobService) -> bool:
    """Ask the worker to stop. One deep in a long step is left behind; its job is taken up at the next start."""
    stopper = threading.Thread(target=jobs.stop, daemon=True)
    stopper.start()
    stopper.join(STOP_S)
    if stopper.is_alive():
        log.warning("the running job did not stop in time; it is taken up at the next start")
        return False
    return True

"""The FastAPI application: everything under /api/v1, failures in one shape, and what operators ask outside.

GET  /healthz   /api/v1/health   /api/v1/ready   /metrics
POST GET      /api/v1/bases                         GET /bases/{[namespace/]name}   …/adapters   …/inspect
POST GET      /api/v1/adapters                      GET /search   /check
GET           /api/v1/adapters/{namespace}/{name}   …/versions   …/bases   …/inspect   …/files/{filename}
PUT DELETE    /api/v1/adapters/{namespace}/{name}/aliases/{alias}
POST          /api/v1/plans   /compositions   /imports
POST          /api/v1/bases/{name}/verifications
GET DELETE    /api/v1/jobs/{id}                     GET /jobs   /jobs/{id}/events   /jobs/{id}/files/{filename}
POST          /api/v1/jobs/{id}/retry   …/publication
POST GET      /api/v1/tokens                        DELETE /tokens/{id}
GET           /api/v1/namespaces                    PUT DELETE /namespaces/{namespace}/members/{subject}
PUT DELETE    /api/v1/adapters/{namespace}/{name}/versions/{version}/yank   …/deprecation   …/quarantine
GET           /api/v1/audit   /whoami   /doctor     POST /collections
              /api/models   /api/repos   /{repository}/resolve    the Hub's protocol (registry/api/hub)
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI
from starlette.concurrency import run_in_threadpool

from registry import __version__
from registry.access import Authenticator, Scope
from registry.api.deps import require
from registry.api.examples import add_examples
from registry.api.failures import RESPONSES, add_handlers
from registry.api.guard import SameOrigin
from registry.api.hub import lfs, listing, reading, repos, writing, xet
from registry.api.hub.signing import Signer
from registry.api.limits import BodyLimit, RateLimit
from registry.api.metrics import Metrics
from registry.api.observing import Observed
from registry.api.routes import access, adapters, bases, compositions, conversions, health
from registry.api.routes import jobs as job_routes

if TYPE_CHECKING:
    from registry.services.jobs import JobService
    from registry.services.local import LocalRegistry

__all__ = ["MAX_UPLOAD_BYTES", "create_app"]

MAX_UPLOAD_BYTES = 64 << 30
PREFIX = "/api/v1"
STOP_S = 10.0


def create_app(
    registry: LocalRegistry,
    jobs: JobService,
    *,
    max_upload_bytes: int = MAX_UPLOAD_BYTES,
    hosts: frozenset[str] | None = None,
    authenticators: tuple[Authenticator, ...] | None = None,
    requests_per_minute: int | None = None,
) -> FastAPI:
    """The service over a registry. The worker of `jobs` runs as long as the application does.

    hosts: names that the service answers for; None is any. authenticators: who recognises callers, asked in order;
    None opens the service to everybody who reaches it. requests_per_minute: of one caller; None is no limit.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        app.state.closing.clear()
        await run_in_threadpool(jobs.start)
        try:
            yield
        finally:
            app.state.closing.set()
            app.state.left_behind = not await run_in_threadpool(jobs.stop, STOP_S)

    app = _Application(
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
    app.state.authenticators = authenticators
    app.state.rate_limit = None if requests_per_minute is None else RateLimit(requests_per_minute)
    app.state.closing = threading.Event()
    app.state.metrics = Metrics(registry, jobs)
    app.add_middleware(BodyLimit)
    app.add_middleware(SameOrigin, hosts=hosts)
    app.add_middleware(Observed, metrics=app.state.metrics, prefix=PREFIX)
    add_handlers(app)
    for module in (bases, adapters, compositions, conversions, job_routes, access, health):
        app.include_router(module.router, prefix=PREFIX, dependencies=[Depends(require(Scope.READ))])
    app.include_router(health.outside)
    for module in (lfs, xet, listing, repos, writing, reading):
        app.include_router(module.router)
    return app


class _Application(FastAPI):
    """A FastAPI whose description has examples."""

    def openapi(self) -> dict[str, Any]:
        """The description, made once."""
        made = self.openapi_schema is not None
        found: dict[str, Any] = super().openapi()
        return found if made else add_examples(found)

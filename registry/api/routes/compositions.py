"""Plans, and compositions, which run as jobs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from composer.recipe import Recipe
from registry.access import Scope
from registry.api.deps import Jobs, Registered, require
from registry.api.schemas import ComposeRequest, ProbedRecipe, RecipeRequest, to_recipe
from registry.schemas import JobInfo, PlanInfo

router = APIRouter(tags=["compositions"])


@router.post("/plans", summary="Plan a composition")
def plan(body: RecipeRequest | Recipe, registry: Registered) -> PlanInfo:
    """What composing the recipe would do, from headers alone; nothing is written."""
    return registry.plan(to_recipe(body))


@router.post("/compositions", summary="Compose", status_code=202, dependencies=[Depends(require(Scope.COMPOSE))])
def compose(
    body: ComposeRequest | ProbedRecipe | Recipe,
    response: Response,
    jobs: Jobs,
    accept_licences: Annotated[bool, Query(description="go on even where licences conflict")] = False,
) -> JobInfo:
    """Queue a job that composes the recipe; Location names it. The very same recipe again is the same job."""
    job = jobs.submit(
        to_recipe(body), accept_licences=accept_licences, probe=None if isinstance(body, Recipe) else body.probe
    )
    response.headers["Location"] = f"/api/v1/jobs/{job.id}"
    return job

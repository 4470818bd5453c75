"""The merged checkpoint with its additions in files beside it; docs/additions.md shows how transformers runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.errors import RecipeError
from composer.exporters.companions import companion_files, write_companions
from composer.plan import Plan
from composer.sinks import FolderSink

__all__ = ["BundleExporter"]


class BundleExporter:
    """What is a weight in the checkpoint, what is none in a companion."""

    def prepare(self, plan: Plan) -> Plan:
        """Raise RecipeError where there is nothing beside the weights."""
        if not plan.additions:
            raise RecipeError(
                "nothing is left to put beside the weights",
                expected="an adapter that adds to the model, such as a soft prompt or a prefix",
                found=str(plan.recipe),
                remedy="export safetensors",
            )
        return plan

    def plan_files(self, plan: Plan) -> dict[str, int]:
        """The companions."""
        return companion_files(plan)

    def export(
        self, plan: Plan, sink: FolderSink, cache_dir: Path | None, progress: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Write the companions."""
        return {"format": "bundle", "additions": write_companions(plan, sink)}, {}

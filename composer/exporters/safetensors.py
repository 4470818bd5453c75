"""The checkpoint as it is: any engine reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.errors import UnsupportedAdapterError
from composer.exporters.companions import COMPANIONS
from composer.plan import Plan
from composer.sinks import FolderSink

__all__ = ["SafetensorsExporter"]

REASONS = {
    "prompt": "a soft prompt is no weight of the base",
    "bottleneck": "it puts small networks with a nonlinearity between the layers, which no weight can hold",
    "prefix": "a prefix is keys and values, and no weight of the base holds those",
}


class SafetensorsExporter:
    """Nothing but weights, and the files that go along."""

    def prepare(self, plan: Plan) -> Plan:
        """Raise UnsupportedAdapterError for an addition that cannot become a weight."""
        for item in plan.additions:
            family = item.addition.family
            raise UnsupportedAdapterError(
                f"{plan.terms[item.term].label} cannot be written as a plain checkpoint: {REASONS[family]}",
                expected="adapters that change weights",
                found=f"{plan.terms[item.term].adapter.signature.kind}: {item.addition.summary}",
                remedy=f"export bundle, which keeps it in {COMPANIONS[family].file} for transformers",
            )
        return plan

    def plan_files(self, plan: Plan) -> dict[str, int]:
        """None but the shards."""
        return {}

    def export(
        self, plan: Plan, sink: FolderSink, cache_dir: Path | None, progress: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Nothing to add."""
        return {"format": "safetensors"}, {}

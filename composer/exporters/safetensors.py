"""The checkpoint as it is: any engine reads it. Soft prompts become words of its vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.additions import SoftPrompt
from composer.errors import UnsupportedAdapterError
from composer.exporters.companions import COMPANIONS
from composer.exporters.vocabulary import with_virtual_tokens
from composer.plan import Plan
from composer.sinks import FolderSink

__all__ = ["SafetensorsExporter"]

REASONS = {
    "bottleneck": "it puts small networks with a nonlinearity between the layers, which no weight can hold",
    "prefix": "it puts keys and values into the cache, which no weight holds and no token of a vocabulary gives",
}


class SafetensorsExporter:
    """Nothing but weights, and the files that go along."""

    def prepare(self, plan: Plan) -> Plan:
        """The plan, or one with soft prompts in the vocabulary.

        Raises UnsupportedAdapterError for an addition that cannot become a weight, and what with_virtual_tokens raises.
        """
        for item in plan.additions:
            if item.addition.family != SoftPrompt.family:
                term = plan.terms[item.term]
                raise UnsupportedAdapterError(
                    f"{term.label} cannot be written as a plain checkpoint: {REASONS[item.addition.family]}",
                    expected="adapters that change weights, and soft prompts",
                    found=f"{term.adapter.signature.kind}: {item.addition.summary}",
                    remedy=f"export bundle, which keeps it in {COMPANIONS[item.addition.family].file} for transformers",
                )
        return with_virtual_tokens(plan) if plan.additions else plan

    def plan_files(self, plan: Plan) -> dict[str, int]:
        """None but the shards."""
        return {}

    def export(
        self, plan: Plan, sink: FolderSink, cache_dir: Path | None, progress: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Nothing to write: what there is to add is in the plan."""
        return {"format": "safetensors", **plan.facts}, {}

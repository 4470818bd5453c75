"""Targets: what a composed checkpoint is turned into, one file (or package) each.

safetensors   the checkpoint itself
onnx          the checkpoint and a graph whose weights lie in its safetensors files
peft          a LoRA in place of the checkpoint
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from composer.checkpoint import Checkpoint
from composer.errors import RecipeError
from composer.exporters.peft import PeftExporter
from composer.kernels import Survival
from composer.plan import Plan
from composer.sinks import FolderSink

__all__ = ["Exporter", "PlanExporter", "check_export", "find_exporter", "find_plan_exporter"]


class Exporter(Protocol):
    """Turns the checkpoint in a sink's folder into an artefact."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise before anything is written when this base cannot be exported."""
        ...

    def export(
        self, sink: FolderSink, cache_dir: Path | None, progress: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Add files to the sink. Returns the facts for composition.json, and seconds by step."""
        ...


class PlanExporter(Protocol):
    """Writes files of its own in place of the merged weights."""

    def check_plan(self, plan: Plan) -> None:
        """Raise before anything is written when this plan cannot become the target."""
        ...

    def plan_files(self, plan: Plan) -> dict[str, int]:
        """The large files that it will write, and at most how many bytes each."""
        ...

    def export_plan(
        self, plan: Plan, sink: FolderSink, inputs: Mapping[str, Any], progress: Callable[[str, int, int], None]
    ) -> tuple[dict[str, Any], Survival]:
        """Write every file. Returns the facts for composition.json, and how much of each adapter is left."""
        ...


class SafetensorsExporter:
    """The checkpoint as it is: any engine reads it."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Every checkpoint will do."""

    def export(
        self, sink: FolderSink, cache_dir: Path | None, progress: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Nothing to add."""
        return {"format": "safetensors"}, {}


class OnnxExporter:
    """A graph beside the weights, verified in ONNX Runtime."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UnsupportedArchitectureError for a model that cannot be traced."""
        from composer.exporters.onnx import supported

        config = dict(checkpoint.config)
        if checkpoint.scheme:  # what is exported is not quantised any more
            del config["quantization_config"]
        supported(config)

    def export(
        self, sink: FolderSink, cache_dir: Path | None, progress: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Write model.onnx and compare it with torch."""
        from composer.exporters.onnx import export_onnx

        result = export_onnx(sink.folder, cache_dir=cache_dir, progress=progress)
        for name in result.files:
            sink.adopt(name)
        facts = asdict(result)
        seconds = facts.pop("seconds")
        facts.pop("graph_cached")
        return {"format": "onnx", **facts}, seconds


PLAN_EXPORTERS: dict[str, PlanExporter] = {"peft": PeftExporter()}
EXPORTERS: dict[str, Exporter] = {"safetensors": SafetensorsExporter(), "onnx": OnnxExporter()}


def find_exporter(name: str) -> Exporter:
    """The exporter of that name."""
    return EXPORTERS[name]


def find_plan_exporter(name: str) -> PlanExporter | None:
    """The exporter of that name, if it takes the place of the merge."""
    return PLAN_EXPORTERS.get(name)


def check_export(plan: Plan) -> None:
    """Raise before anything is written when this plan cannot be exported as its recipe says."""
    if plan.recipe.requantise:
        from composer.requantise import check_requantise  # built on composer.run, which is built on this package

        check_requantise(plan)
    in_place = find_plan_exporter(plan.recipe.export)
    if plan.recipe.rank is not None and in_place is None:
        raise RecipeError(
            f"a rank belongs to a LoRA, not to the export {plan.recipe.export.value!r}",
            expected="export peft",
            found={"export": plan.recipe.export.value, "rank": plan.recipe.rank},
            remedy="leave the rank out, or export peft; merged weights of a low rank: --method svd -p rank=N",
        )
    if in_place is not None:
        in_place.check_plan(plan)
    else:
        find_exporter(plan.recipe.export).check(plan.checkpoint)

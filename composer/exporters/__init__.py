"""Targets: what a composed checkpoint is turned into, one file (or package) each.

safetensors   the checkpoint itself
onnx          the checkpoint and a graph whose weights lie in its safetensors files
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from composer.checkpoint import Checkpoint
from composer.sinks import FolderSink

__all__ = ["Exporter", "find_exporter"]


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


EXPORTERS: dict[str, Exporter] = {"safetensors": SafetensorsExporter(), "onnx": OnnxExporter()}


def find_exporter(name: str) -> Exporter:
    """The exporter of that name."""
    return EXPORTERS[name]

"""Put a plan's adapters into its graph as the recipe places them, verify each, and say what was written.

bound graph of the base ─► insert ─► .model.onnx.*.tmp ─► verify without any adapter (verify.py)
                                                          verify with each of them (verify_adapters.py)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.apart import load_factors
from composer.exporters.onnx.adapted import note_adapters
from composer.exporters.onnx.architectures import Architecture
from composer.exporters.onnx.separate import ADAPTER_SUFFIX, insert_adapter_inputs, write_adapter
from composer.exporters.onnx.verify import Verification
from composer.exporters.onnx.verify_adapters import verify_adapters
from composer.kernels import Survival
from composer.plan import Plan
from composer.sinks import FolderSink

if TYPE_CHECKING:
    import onnx

__all__ = ["SeparateAdapters", "apart_files", "kept_apart"]

OVERHEAD = 128  # bytes that a file of adapters takes for itself and for a tensor besides its name, at most
ROWS = 4  # of a batch that a separate adapter is verified on


class SeparateAdapters:
    """The adapters of a plan as files of their own; `entries` says what was written, in the recipe's order."""

    def __init__(self, plan: Plan, sink: FolderSink) -> None:
        self.plan, self.sink = plan, sink
        self.entries: list[dict[str, Any]] = []

    def insert(self, model: onnx.ModelProto) -> None:
        """Add the inputs to the bound graph, and write the files. Raises what `insert_adapter_inputs` raises."""
        jobs = {job.name: (job, item) for adapter in self.plan.apart for job, item in adapter.deltas}
        insert_adapter_inputs(
            model,
            {
                name: job.shape if item.delta.transposed else job.shape[::-1]
                for name, (job, item) in sorted(jobs.items())
            },
        )
        for adapter in self.plan.apart:
            factors = {job.name: load_factors(job, item) for job, item in adapter.deltas}
            survival = Survival(1)
            for pair in factors.values():
                survival.add_products(pair, pair, {0: pair})
            file = f"{adapter.name}{ADAPTER_SUFFIX}"
            write_adapter(self.sink.folder / file, factors)
            self.sink.adopt(file)
            self.entries.append(
                {
                    "name": adapter.name,
                    "ref": self.plan.terms[adapter.term].label,
                    "file": file,
                    "rank": adapter.rank,
                    "modules": len(factors),
                    "norm": float(f"{survival.norms()[0]:.6g}"),
                }
            )
        noted = [{"name": entry["name"], "file": entry["file"]} for entry in self.entries]
        note_adapters(model, self.plan.recipe.placement, noted)

    def verify(self, path: Path, architecture: Architecture, say: Callable[[str], None]) -> Verification:
        """Each adapter by itself. Raises OnnxVerificationError."""
        batches = [[index] * ROWS for index in range(len(self.plan.apart))]
        return verify_adapters(self.sink.folder, path, architecture, self.plan.apart, batches, say)


def kept_apart(plan: Plan, sink: FolderSink) -> SeparateAdapters:
    """What puts the adapters of a plan where its recipe places them."""
    return SeparateAdapters(plan, sink)


def apart_files(plan: Plan) -> dict[str, int]:
    """The files of the adapters, and at most how many bytes each."""
    files = {}
    for adapter in plan.apart:
        numbers = sum(item.delta.a.shape[0] * sum(job.shape) for job, item in adapter.deltas)
        names = sum(2 * (OVERHEAD + len(job.name)) for job, _ in adapter.deltas)
        files[f"{adapter.name}{ADAPTER_SUFFIX}"] = 4 * numbers + names + OVERHEAD
    return files

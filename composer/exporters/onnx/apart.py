"""Put a plan's adapters into its graph as the recipe places them, verify each, and say what was written.

    bound graph of the base ─► insert ─► .model.onnx.*.tmp ─► verify without any adapter (verify.py)
                                                              verify with each of them (verify_adapters.py)

separate    separate.py: optional inputs, and a file for each adapter
multi       multi.py: the files of vectors.py, and nodes that gather from them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from composer.apart import ApartAdapter, load_factors, rank_of
from composer.exporters.onnx.adapted import note_adapters
from composer.exporters.onnx.architectures import Architecture
from composer.exporters.onnx.multi import insert_rows
from composer.exporters.onnx.multi_index import Module, arrange, make_index, note_rows
from composer.exporters.onnx.separate import ADAPTER_SUFFIX, insert_adapter_inputs, write_adapter
from composer.exporters.onnx.vectors import (
    Block,
    VectorFiles,
    encode_index,
    index_file,
    index_size,
    vectors_file,
    vectors_size,
)
from composer.exporters.onnx.verify import Verification
from composer.exporters.onnx.verify_adapters import verify_adapters
from composer.kernels import Survival
from composer.plan import Plan
from composer.recipe import Placement
from composer.sinks import FolderSink

if TYPE_CHECKING:
    import onnx

__all__ = ["MultiAdapters", "SeparateAdapters", "apart_files", "kept_apart"]

OVERHEAD = 128  # bytes that a file of adapters takes for itself and for a tensor besides its name, at most
ROWS = 4  # of a batch that a separate adapter is verified on
MIXED = 6  # adapters in a batch that is verified


class SeparateAdapters:
    """The adapters of a plan as files of their own; `entries` says what was written, in the recipe's order."""

    def __init__(self, plan: Plan, sink: FolderSink) -> None:
        self.plan, self.sink = plan, sink
        self.entries: list[dict[str, Any]] = []

    def insert(self, model: onnx.ModelProto) -> None:
        """Add the inputs to the bound graph, and write the files. Raises what `insert_adapter_inputs` raises."""
        modules = _modules(self.plan)
        insert_adapter_inputs(model, {name: (module.inputs, module.outputs) for name, module in modules.items()})
        for adapter in self.plan.apart:
            factors = {job.name: load_factors(job, item) for job, item in adapter.deltas}
            file = f"{adapter.name}{ADAPTER_SUFFIX}"
            write_adapter(self.sink.folder / file, factors)
            self.sink.adopt(file)
            self.entries.append({**_entry(self.plan, adapter), "file": file, "norm": _norm(factors.values())})
        noted = [{"name": entry["name"], "file": entry["file"]} for entry in self.entries]
        note_adapters(model, {"placement": Placement.SEPARATE.value, "adapters": noted})

    def verify(self, path: Path, architecture: Architecture, say: Callable[[str], None]) -> Verification:
        """Each adapter by itself. Raises OnnxVerificationError."""
        batches = [[index] * ROWS for index in range(len(self.plan.apart))]
        return verify_adapters(self.sink.folder, path, architecture, self.plan.apart, batches, say)


class MultiAdapters:
    """The adapters of a plan as rows of one graph; `entries` says what was written, in the recipe's order."""

    def __init__(self, plan: Plan, sink: FolderSink) -> None:
        self.plan, self.sink = plan, sink
        self.entries: list[dict[str, Any]] = []

    def insert(self, model: onnx.ModelProto) -> None:
        """Write the files of vectors and their index, and add the nodes to the bound graph.

        Raises OnnxExportError where the graph has no place for them.
        """
        modules, counts = _modules(self.plan), _counts(self.plan)
        groups = arrange(model.graph, modules)
        adapters = []
        with VectorFiles(self.sink, counts) as files:
            for number, adapter in enumerate(self.plan.apart, 1):
                factors = {job.name: load_factors(job, item) for job, item in adapter.deltas}
                adapters.append({name: Block(len(b), files.add(a.T), files.add(b)) for name, (a, b) in factors.items()})
                self.entries.append({**_entry(self.plan, adapter), "id": number, "norm": _norm(factors.values())})
        self.sink.write(index_file(len(adapters)), encode_index(make_index(groups, adapters)))
        insert_rows(model, self.sink.folder, groups, len(adapters), counts)
        note_rows(model, [entry["name"] for entry in self.entries], modules, counts)

    def verify(self, path: Path, architecture: Architecture, say: Callable[[str], None]) -> Verification:
        """Mixed batches: the base, some adapters and the first of them once more. Raises OnnxVerificationError."""
        numbers = range(len(self.plan.apart))
        batches = [[*numbers[at : at + MIXED], None, at] for at in range(0, len(numbers), MIXED)]
        return verify_adapters(self.sink.folder, path, architecture, self.plan.apart, batches, say)


def kept_apart(plan: Plan, sink: FolderSink) -> SeparateAdapters | MultiAdapters:
    """What puts the adapters of a plan where its recipe places them."""
    kinds = {Placement.SEPARATE: SeparateAdapters, Placement.MULTI: MultiAdapters}
    return kinds[plan.recipe.placement](plan, sink)


def apart_files(plan: Plan) -> dict[str, int]:
    """The files of the adapters, and at most how many bytes each."""
    if plan.recipe.placement is Placement.MULTI:
        files = {vectors_file(width): vectors_size(width, rows) for width, rows in sorted(_counts(plan).items())}
        places = 2 * sum(module.rank for module in _modules(plan).values())
        return {**files, index_file(len(plan.apart)): index_size(len(plan.apart), places)}
    files = {}
    for adapter in plan.apart:
        numbers = sum(item.delta.a.shape[0] * sum(job.shape) for job, item in adapter.deltas)
        names = sum(2 * (OVERHEAD + len(job.name)) for job, _ in adapter.deltas)
        files[f"{adapter.name}{ADAPTER_SUFFIX}"] = 4 * numbers + names + OVERHEAD
    return files


def _modules(plan: Plan) -> dict[str, Module]:
    """What any of the adapters changes, by the weight's name, with the largest rank."""
    modules: dict[str, Module] = {}
    for adapter in plan.apart:
        for job, item in adapter.deltas:
            inputs, outputs = job.shape if item.delta.transposed else job.shape[::-1]
            rank = max(rank_of(item), modules[job.name].rank if job.name in modules else 0)
            modules[job.name] = Module(inputs, outputs, rank)
    return dict(sorted(modules.items()))


def _counts(plan: Plan) -> dict[int, int]:
    """The vectors of each length, the zero of each among them."""
    modules, counts = _modules(plan), Counter[int]()
    for adapter in plan.apart:
        for job, item in adapter.deltas:
            counts[modules[job.name].inputs] += rank_of(item)
            counts[modules[job.name].outputs] += rank_of(item)
    return {width: 1 + count for width, count in counts.items()}


def _norm(factors: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """‖Δ‖ (Frobenius, over all modules)."""
    survival = Survival(1)
    for pair in factors:
        survival.add_products(pair, pair, {0: pair})
    return float(f"{survival.norms()[0]:.6g}")


def _entry(plan: Plan, adapter: ApartAdapter) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "ref": plan.terms[adapter.term].label,
        "rank": max(rank_of(item) for _, item in adapter.deltas),
        "modules": len(adapter.deltas),
    }

"""Export a checkpoint folder to ONNX: trace a graph once, bind it to weights in milliseconds, verify before publishing.

    config.json ──► architectures    refuse what is not known, before anything is written
        │
        ▼
    graph_cache ──► hit ─────────────┐
        │ miss                       ▼
        └─► skeleton ─► trace ────► bind     initializers point into *.safetensors
            (minutes, no weights)    │       (milliseconds)
                                     ▼
                                bottlenecks  where bottlenecks.json lies in the folder: their nodes
                                apart        adapters that are kept apart from the weights: their inputs or rows
                                     ▼
                                 vary        another flavour, dtype or quantised matrices, where asked for
                                     ▼
                           .model.onnx.*.tmp
                                     │
                                  verify     ONNX Runtime against torch, in float32
                                     │
                      model.onnx ◄───┴───► deleted, OnnxVerificationError

An encoder-decoder becomes two files in the same way, each a graph of its own: see `seq2seq`.
A folder's `model.onnx` has no weights of its own: it belongs to the safetensors files beside it and moves with them.
Weights keep their dtype; inputs, outputs and arithmetic are float32 (see `bind`), unless a variant is asked for.
`session` opens and runs the result.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from composer.bottlenecks import BUNDLE
from composer.errors import NotFoundError
from composer.exporters.onnx import bind, graph_cache, seq2seq, trace, verify
from composer.exporters.onnx.architectures import ARCHITECTURES, Architecture, architecture_of, supported
from composer.exporters.onnx.bottlenecks import insert_bottlenecks
from composer.exporters.onnx.genai import require_genai
from composer.exporters.onnx.session import generate, open_session, require_runtime
from composer.exporters.onnx.variants import Variant, check_variant
from composer.exporters.onnx.vary import publish_variant
from composer.exporters.onnx.virtual_tokens import insert_virtual_tokens
from composer.sinks import fsync_folder

if TYPE_CHECKING:
    import onnx

__all__ = [
    "ARCHITECTURES",
    "MODEL_FILE",
    "KeptApart",
    "OnnxExport",
    "Variant",
    "export_onnx",
    "find_graph",
    "generate",
    "open_session",
    "supported",
    "write_aside",
]

MODEL_FILE = "model.onnx"
PLAIN = Variant()


@dataclass(frozen=True, slots=True)
class OnnxExport:
    """What was written, and the evidence that it computes what the torch model computes.

    files: names written into the folder.
    weight_dtype: the dtype that most weights are stored in; compute_dtype: the dtype of inputs, outputs, arithmetic.
    agreement, kl_divergence: of a variant that rounds, see Verification; quantised: what its matrices became.
    compared_in: another dtype that the graph was compared in, where the CPU cannot compute in its own.
    graph_digest: what the graphs were made from; equal digests share cached graphs. graph_cached: none was traced.
    max_abs_diff, tolerance: over all `checks`; each check also names its prompts, padding, tokens and own difference.
    seconds: trace, bind, verify.
    """

    files: tuple[str, ...]
    architecture: str
    task: str
    flavour: str
    opset: int
    weight_dtype: str
    compute_dtype: str
    graph_digest: str
    graph_cached: bool
    max_abs_diff: float
    tolerance: float
    checks: tuple[dict[str, Any], ...]
    seconds: dict[str, float]
    compared_in: str | None = None
    quantised: str | None = None
    agreement: float | None = None
    kl_divergence: float | None = None


class KeptApart(Protocol):
    """Adapters that the graph is to hold beside the weights."""

    def insert(self, model: onnx.ModelProto) -> None:
        """Add them to the bound graph."""
        ...

    def verify(self, path: Path, architecture: Architecture, say: Callable[[str], None]) -> verify.Verification:
        """Compare the graph in `path`, which lies in the folder, with torch, each of them active."""
        ...


def export_onnx(
    folder: Path,
    *,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
    variant: Variant = PLAIN,
    apart: KeptApart | None = None,
) -> OnnxExport:
    """Write `model.onnx`, or the two files of an encoder-decoder, into a complete checkpoint folder, and verify them.

    Their weights stay in the folder's safetensors files.
    folder: config.json and model.safetensors, or shards with model.safetensors.index.json; a tokenizer is used to
        make prompts when there is one. Weights are float32, float16 or bfloat16.
    cache_dir: where weightless graphs are kept between exports; None traces anew each time.
    variant: what is made of the graph; see `variants` and `vary`.
    apart: adapters for the graph; without any of them active it is compared as one that has none.
    Only verified files get these names. When verification fails, older files of the names are deleted as well: they
    point into the same weights.
    Raises, before anything is written: NotFoundError, UnsupportedArchitectureError, MissingDependencyError.
    Raises OnnxExportError when tracing or binding fails, OnnxVerificationError when the results differ.
    """
    folder = Path(folder)
    say = progress or (lambda _: None)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise NotFoundError(
            f"onnx: {folder}: no config.json", expected="a complete checkpoint folder", remedy="compose one first"
        )
    config = json.loads(config_path.read_text(encoding="utf-8"))
    architecture = architecture_of(config)
    check_variant(architecture, variant)
    require_runtime()
    if variant.flavour == "genai":
        require_genai()
    bind.stored_tensors(folder)

    row = architecture
    graphs = {MODEL_FILE: row}
    if row.is_seq2seq:
        row = replace(row, own_head=bind.own_head(folder))
        graphs = seq2seq.parts(row)
    clock = [time.perf_counter()]
    traced = {}
    for file, part in graphs.items():
        digest = graph_cache.digest_of(config, part)
        graph, cached = _graph(folder, part, digest, cache_dir, say)
        graph.metadata_props.add(key="composer.graph_digest", value=digest)
        traced[file] = graph, cached
    clock.append(time.perf_counter())
    models = {}
    for file, part in graphs.items():
        bound = bind.bind(traced[file][0], folder)
        if (folder / BUNDLE).is_file():
            insert_bottlenecks(bound.model, folder, half=row.is_seq2seq)
        insert_virtual_tokens(bound.model, folder, config, part)
        if apart is not None:
            apart.insert(bound.model)
        models[file] = bound.model
    files = tuple(graphs)
    if variant.is_plain:
        result = _publish(models, folder, architecture, apart, say, clock)
    else:
        clock.append(time.perf_counter())
        files, result = publish_variant(models[MODEL_FILE], folder, MODEL_FILE, config, architecture, variant, say)
    clock.append(time.perf_counter())
    return OnnxExport(
        files=files,
        architecture=architecture.name,
        task=architecture.task,
        flavour=variant.flavour,
        opset=architecture.opset,
        weight_dtype=bound.weight_dtype,
        compute_dtype=variant.compute,
        graph_digest=graph_cache.digest_of(config, row),
        graph_cached=all(cached for _, cached in traced.values()),
        max_abs_diff=result.max_abs_diff,
        tolerance=result.tolerance,
        checks=result.checks,
        compared_in=None if variant.on_cpu == variant else variant.on_cpu.compute,
        quantised=variant.quantise,
        agreement=result.agreement,
        kl_divergence=result.kl_divergence,
        seconds={
            name: round(after - before, 4)
            for name, (before, after) in zip(("trace", "bind", "verify"), itertools.pairwise(clock), strict=True)
        },
    )


def find_graph(folder: Path) -> Path:
    """The graph in a composed folder. Raises NotFoundError where there is none."""
    path = folder / MODEL_FILE
    if not path.is_file():
        raise NotFoundError(
            f"{folder} has no {MODEL_FILE}",
            expected=MODEL_FILE,
            found="a folder without a graph" if folder.is_dir() else "no folder",
            remedy="compose it with --export onnx",
            path=path,
        )
    return path


def _graph(
    folder: Path, architecture: Architecture, digest: str, cache_dir: Path | None, say: Callable[[str], None]
) -> tuple[onnx.ModelProto, bool]:
    """The weightless graph, and whether it came from the cache; a damaged entry is traced again and replaced."""
    if cache_dir is not None:
        graph = graph_cache.load(Path(cache_dir), digest)
        if graph is not None:
            say(f"graph {digest[:12]} from the cache")
            return graph, True
    say(f"trace {architecture.name} at opset {architecture.opset} (once per configuration; minutes for a large model)")
    graph = trace.trace(folder, architecture)
    if cache_dir is not None:
        graph_cache.store(Path(cache_dir), digest, graph)
    return graph, False


def _publish(
    models: dict[str, onnx.ModelProto],
    folder: Path,
    architecture: Architecture,
    apart: KeptApart | None,
    say: Callable[[str], None],
    clock: list[float],
) -> verify.Verification:
    """Write the graphs aside, verify them together, and give them their names, or delete older ones of these."""
    asides: dict[str, Path] = {}
    try:
        for file, model in models.items():
            asides[file] = write_aside(folder, model, file)
        clock.append(time.perf_counter())
        say(f"verify {architecture.name} in ONNX Runtime against torch")
        try:
            result = verify.verify(folder, list(asides.values()), architecture)
            if apart is not None:
                result = result.joined(apart.verify(asides[MODEL_FILE], architecture, say))
            for file, aside in asides.items():
                os.replace(aside, folder / file)
        except Exception:
            for file in models:
                (folder / file).unlink(missing_ok=True)
            raise
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)
    fsync_folder(folder)
    return result


def write_aside(folder: Path, model: onnx.ModelProto, name: str = MODEL_FILE) -> Path:
    """The model under a name of its own in `folder`, where ONNX Runtime finds the weights; on disk when returned."""
    handle, aside = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(model.SerializeToString())
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return Path(aside)

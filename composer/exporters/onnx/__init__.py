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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from composer.bottlenecks import BUNDLE
from composer.errors import NotFoundError
from composer.exporters.onnx import bind, graph_cache, trace, verify
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
    graph_digest: what the graph was made from; equal digests share one cached graph. graph_cached: it was not traced.
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
    """Write `model.onnx` into a complete checkpoint folder, pointing into its safetensors files, and verify it.

    folder: config.json and model.safetensors, or shards with model.safetensors.index.json; a tokenizer is used to
        make prompts when there is one. Weights are float32, float16 or bfloat16.
    cache_dir: where weightless graphs are kept between exports; None traces anew each time.
    variant: what is made of the graph; see `variants` and `vary`.
    apart: adapters for the graph; without any of them active it is compared as one that has none.
    Only a verified file gets the name model.onnx. When verification fails, an older model.onnx is deleted as well:
    it points into the same weights.
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

    clock = [time.perf_counter()]
    digest = graph_cache.digest_of(config, architecture)
    graph, cached = _graph(folder, architecture, digest, cache_dir, say)
    clock.append(time.perf_counter())
    bound = bind.bind(graph, folder)
    if (folder / BUNDLE).is_file():
        insert_bottlenecks(bound.model, folder)
    insert_virtual_tokens(bound.model, folder, config, architecture)
    if apart is not None:
        apart.insert(bound.model)
    graph.metadata_props.add(key="composer.graph_digest", value=digest)
    if variant == PLAIN:
        aside = write_aside(folder, bound.model)
        clock.append(time.perf_counter())
        files: tuple[str, ...] = (MODEL_FILE,)
        try:
            say(f"verify {architecture.name} in ONNX Runtime against torch")
            result = verify.verify(folder, aside, architecture)
            if apart is not None:
                result = result.joined(apart.verify(aside, architecture, say))
            os.replace(aside, folder / MODEL_FILE)
        except Exception:
            (folder / MODEL_FILE).unlink(missing_ok=True)
            raise
        finally:
            aside.unlink(missing_ok=True)
        fsync_folder(folder)
    else:
        clock.append(time.perf_counter())
        files, result = publish_variant(bound.model, folder, MODEL_FILE, config, architecture, variant, say)
    clock.append(time.perf_counter())
    return OnnxExport(
        files=files,
        architecture=architecture.name,
        task=architecture.task,
        flavour=variant.flavour,
        opset=architecture.opset,
        weight_dtype=bound.weight_dtype,
        compute_dtype=variant.compute,
        graph_digest=digest,
        graph_cached=cached,
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


def write_aside(folder: Path, model: onnx.ModelProto) -> Path:
    """The model under a name of its own in `folder`, where ONNX Runtime finds the weights; on disk when returned."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{MODEL_FILE}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(model.SerializeToString())
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)

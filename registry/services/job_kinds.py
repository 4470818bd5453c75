"""What a job can be: one function a kind, from a stored request to a schema.

compose   a recipe, its versions pinned when it was submitted      -> CompositionInfo, files in compositions/<job>
publication   what a compose made, as a base or an adapter         -> BaseInfo or PublishResult
import    an adapter or a base of a hub                             -> ImportInfo
base      a checkpoint folder, fingerprinted and registered        -> BaseInfo
verify    a registered base, fingerprinted again                   -> BaseCheck
extract, resize       a LoRA made of other things                  -> ConversionInfo, files in compositions/<job>
delta, restore        a fine-tune as its difference, and back      -> DeltaInfo, files in compositions/<job>

A kind may run more than once (its worker was killed), so it must be idempotent. It is given a progress function that
raises when the job is to stop, and must call it now and then.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.recipe import Recipe
from registry.interface import Progress
from registry.schemas import (
    BaseCheck,
    BaseInfo,
    CompositionInfo,
    ConversionInfo,
    DeltaInfo,
    ImportInfo,
    PublishResult,
    Relation,
    Schema,
)

if TYPE_CHECKING:
    from registry.services.local import LocalRegistry

__all__ = ["CONVERSIONS", "KINDS", "WITH_FILES", "Run", "job_kind"]

Run = Callable[["LocalRegistry", str, dict[str, Any], Progress], Schema]
KINDS: dict[str, Run] = {}
CONVERSIONS = ("extract", "resize", "delta", "restore")
WITH_FILES = ("compose", *CONVERSIONS)


def job_kind(name: str) -> Callable[[Run], Run]:
    """Register the function that runs jobs of this kind: (registry, job id, request, progress) to its result."""

    def register(run: Run) -> Run:
        if name in KINDS:
            raise ValueError(f"two kinds of job are named {name!r}")
        KINDS[name] = run
        return run

    return register


@job_kind("compose")
def compose(registry: LocalRegistry, job_id: str, request: dict[str, Any], progress: Progress) -> CompositionInfo:
    """Compose into the job's folder; half-written folders of an earlier attempt are removed."""
    folder = _cleared(registry, job_id)
    pins = request["pins"]
    result = registry.compose(
        Recipe.model_validate(request["recipe"]), folder, replace=True, progress=progress,
        **({"pins": tuple(pins)} if pins else {}), accept_licences=request.get("accept_licences", False),
        probe=request.get("probe"),
    )  # fmt: skip
    return result.model_copy(update={"out": ""})


def _cleared(registry: LocalRegistry, job_id: str) -> Path:
    """The job's folder, without what earlier attempts left half-written."""
    for leftover in registry.layout.compositions.glob(f".{job_id}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return registry.layout.compositions / job_id


@job_kind("base")
def add_base(registry: LocalRegistry, _: str, request: dict[str, Any], progress: Progress) -> BaseInfo:
    """Register a checkpoint where it lies; an upload that turns out to be registered already is removed."""
    folder = Path(request["folder"])
    relation = request["relation"]
    base = registry.add_base(
        folder, name=request["name"], parent=request["parent"], relation=relation and Relation(relation),
        license=request.get("license"), progress=progress,
    )  # fmt: skip
    if registry.layout.uploads in folder.parents and Path(base.location) != folder.resolve():
        shutil.rmtree(registry.layout.uploads / folder.relative_to(registry.layout.uploads).parts[0])
    return base


@job_kind("publication")
def publish(registry: LocalRegistry, _: str, request: dict[str, Any], progress: Progress) -> BaseInfo | PublishResult:
    """Publish the output of another job."""
    return registry.publish_composed(registry.layout.compositions / request["job"], request["name"], progress=progress)


@job_kind("import")
def import_model(registry: LocalRegistry, _: str, request: dict[str, Any], progress: Progress) -> ImportInfo:
    """Fetch from a hub; what an earlier attempt fetched is there."""
    progress("asking the hub", 0, 0)
    return registry.import_model(**request, progress=progress)


@job_kind("verify")
def verify_base(registry: LocalRegistry, _: str, request: dict[str, Any], progress: Progress) -> BaseCheck:
    """Hash every tensor of a registered base again."""
    return registry.verify_base(request["base"], progress=progress)


def _new(registry: LocalRegistry, job_id: str) -> Path:
    """As `_cleared`, for what does not write over a folder: a whole result of an earlier attempt is made again."""
    folder = _cleared(registry, job_id)
    if folder.exists():
        shutil.rmtree(folder)
    return folder


@job_kind("extract")
def extract(registry: LocalRegistry, job_id: str, request: dict[str, Any], progress: Progress) -> ConversionInfo:
    """A LoRA of what one registered base changed in another."""
    result = registry.extract(out=_new(registry, job_id), progress=progress, **request)
    return result.model_copy(update={"out": ""})


@job_kind("resize")
def resize(registry: LocalRegistry, job_id: str, request: dict[str, Any], progress: Progress) -> ConversionInfo:
    """A registered LoRA at another rank."""
    progress("resizing", 0, 0)
    result = registry.resize(out=_new(registry, job_id), **request)
    return result.model_copy(update={"out": ""})


@job_kind("delta")
def make_delta(registry: LocalRegistry, job_id: str, request: dict[str, Any], progress: Progress) -> DeltaInfo:
    """The exact difference of two registered bases."""
    result = registry.make_delta(out=_new(registry, job_id), progress=progress, **request)
    return result.model_copy(update={"out": ""})


@job_kind("restore")
def restore_delta(registry: LocalRegistry, job_id: str, request: dict[str, Any], progress: Progress) -> DeltaInfo:
    """The checkpoint that a registered difference was made of."""
    result = registry.restore_delta(out=_new(registry, job_id), progress=progress, **request)
    return result.model_copy(update={"out": ""})

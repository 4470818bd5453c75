"""The nouns as they cross a boundary: what services return, what REST sends, what the CLI prints.

All are immutable pydantic models; times are UTC, sizes are bytes, digests carry their scheme (``sha256:…``, ``wf1:…``).
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from composer.recipe import Recipe

__all__ = [
    "Advice",
    "BaseFit",
    "BaseInfo",
    "BaseStatus",
    "CompatibleAdapter",
    "CompositionInfo",
    "DoctorCheck",
    "FileInfo",
    "JobInfo",
    "JobState",
    "Level",
    "Page",
    "PlanInfo",
    "PlannedAdapter",
    "PublishResult",
    "Reason",
    "Relation",
    "Verdict",
    "VersionInfo",
]

T = TypeVar("T")


class Schema(BaseModel):
    """Immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Level(StrEnum):
    """How well an adapter fits a base, best first."""

    EXACT = "exact"
    SAME_VALUES = "same-values"
    LINEAGE = "lineage"
    SHAPE = "shape"
    INCOMPATIBLE = "incompatible"


class BaseStatus(StrEnum):
    """What is known of the base that an adapter was trained on."""

    VERIFIED = "verified"  # its hash is known and that base is registered
    PENDING = "pending"  # its hash is known; the base is not registered (yet)
    UNVERIFIED = "unverified"  # known by name only


class Relation(StrEnum):
    """How a base came from its parent."""

    FINETUNE = "finetune"
    QUANTIZED = "quantized"
    MERGED = "merged"
    RESIZED = "resized"


class JobState(StrEnum):
    """A job's life: queued, running, then one of the others."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Reason(Schema):
    """Why a verdict is what it is, and what a person can do about it."""

    code: str
    message: str
    remedy: str | None = None


class Verdict(Schema):
    """A compatibility level with its reasons."""

    level: Level
    reasons: tuple[Reason, ...] = ()


class Advice(Schema):
    """What the literature says against an adapter or a composition (registry.preflight); it refuses nothing."""

    code: str = Field(description="stable: programs may match it")
    adapter: str = Field(description="the adapter, or adapters, that it is about")
    message: str
    source: str = Field(description="the URL of the paper")

    def __str__(self) -> str:
        return f"{self.adapter}: {self.message} [{self.code}, {self.source}]"


class FileInfo(Schema):
    """One file of a version, a base or a composition."""

    name: str
    size: int
    sha256: str


class BaseInfo(Schema):
    """A registered base model."""

    name: str
    fingerprint: str = Field(description="wf1: hash of all weights and of the config fields that change behaviour")
    tensor_root: str
    value_root: str
    layout_digest: str
    config_digest: str
    tokenizer_digest: str | None
    chat_template_digest: str | None
    architecture: str
    dtype: str
    parameters: int
    tensors: int
    nbytes: int
    location: str = Field(description="the folder it is read from, or 'store' when the registry keeps the bytes")
    parent: str | None = None
    relation: Relation | None = None
    created_at: datetime
    created: bool = Field(default=False, description="whether this call registered it")


class VersionInfo(Schema):
    """One immutable version of an adapter."""

    name: str = Field(description="namespace/name")
    version: str
    digest: str
    kind: str
    rank: int | None
    alpha: float | None
    target_modules: tuple[str, ...]
    parameters: int
    nbytes: int
    base_status: BaseStatus
    base_fingerprint: str | None
    base_name: str | None = Field(description="the base as its trainer named it; proves nothing")
    base: str | None = Field(description="the registered base with that fingerprint")
    license: str | None = None
    tags: tuple[str, ...] = ()
    description: str = ""
    aliases: tuple[str, ...] = ()
    files: tuple[FileInfo, ...] = ()
    created_at: datetime


class Page(Schema, Generic[T]):
    """One page of a listing; give `next` as `cursor` to go on."""

    items: tuple[T, ...]
    next: str | None = None


class PublishResult(Schema):
    """What a publish did; `created` is false when these very bytes were there already."""

    version: VersionInfo
    created: bool
    warnings: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = ()


class CompatibleAdapter(Schema):
    """An adapter that fits a base."""

    adapter: VersionInfo
    verdict: Verdict


class BaseFit(Schema):
    """A base that an adapter fits."""

    base: BaseInfo
    verdict: Verdict


class PlannedAdapter(Schema):
    """One adapter of a plan, resolved."""

    ref: str
    version: str | None
    digest: str
    weight: float
    verdict: Verdict
    tensors: int


class PlanInfo(Schema):
    """What a compose would do, computed from headers alone."""

    recipe: Recipe
    recipe_text: str
    base: str
    base_fingerprint: str
    adapters: tuple[PlannedAdapter, ...]
    accepted: bool
    warnings: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = Field(default=(), description="what the literature says against it")
    additions: tuple[str, ...] = Field(default=(), description="what adapters add to the model, in order")
    touched: int
    total: int
    nbytes: int
    peak_bytes: int
    files: dict[str, int]


class CompositionInfo(Schema):
    """A finished composition."""

    recipe_text: str
    export: str
    out: str = Field(description="the folder written; empty for one that lies on the service")
    output_digest: str
    nbytes: int
    cached: bool = Field(description="whether the same recipe over the same inputs was there already")
    warnings: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = ()
    record: dict[str, Any] = Field(default_factory=dict, description="composition.json")
    seconds: dict[str, float] = Field(default_factory=dict)


class ConversionInfo(Schema):
    """A LoRA that was extracted or resized."""

    out: str
    output_digest: str
    nbytes: int
    kept_energy: float = Field(description="share of the sum of squared singular values, over all modules")
    record: dict[str, Any] = Field(description="provenance.json")


class DeltaInfo(Schema):
    """A fine-tune stored as a delta, or restored from one."""

    out: str
    output_digest: str
    nbytes: int = Field(description="of the files written")
    checkpoint_nbytes: int = Field(description="of the weights that the delta stands for")
    tensors: int = Field(description="how many tensors differ from the base's")


class JobInfo(Schema):
    """A compose that runs on the service."""

    id: str
    state: JobState
    recipe: Recipe
    recipe_text: str
    step: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    error: dict[str, Any] | None = None
    result: CompositionInfo | None = None
    created_at: datetime
    finished_at: datetime | None = None


class DoctorCheck(Schema):
    """One line of `registry doctor`."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None

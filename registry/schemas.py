"""The nouns as they cross a boundary: what services return, what REST sends, what the CLI prints.

All are immutable pydantic models; times are UTC, sizes are bytes, digests carry their scheme (``sha256:…``, ``wf1:…``).
"""

from __future__ import annotations

from contextvars import ContextVar
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_serializer

from composer.recipe import Recipe
from registry.access import Role, Scope

__all__ = [
    "SHOWS_PLACES",
    "Advice",
    "AuditEntry",
    "BaseCheck",
    "BaseFit",
    "BaseInfo",
    "BaseStatus",
    "Collected",
    "CompatibleAdapter",
    "CompositionInfo",
    "DoctorCheck",
    "FileInfo",
    "ImportInfo",
    "JobInfo",
    "JobState",
    "Level",
    "LicenceLevel",
    "LicenceVerdict",
    "LineageEdge",
    "LineageEvidence",
    "LineageInfo",
    "Member",
    "NamespaceInfo",
    "NewToken",
    "Page",
    "PlanInfo",
    "PlannedAdapter",
    "PublishResult",
    "Readiness",
    "Reason",
    "Relation",
    "Score",
    "Screening",
    "SignatureInfo",
    "Signed",
    "SignedBundle",
    "TokenInfo",
    "Verdict",
    "Verification",
    "VersionInfo",
    "VersionState",
]

T = TypeVar("T")
# Whether the paths of this machine go out: a request of somebody who is no admin turns that off for its answer.
SHOWS_PLACES: ContextVar[bool] = ContextVar("shows_places", default=True)


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


class VersionState(StrEnum):
    """What may be done with a version; registry.lifecycle says it in words."""

    PUBLISHED = "published"
    YANKED = "yanked"
    QUARANTINED = "quarantined"


class LicenceLevel(StrEnum):
    """Whether licences go together, best first."""

    CLEAR = "clear"
    TERMS = "terms"
    UNKNOWN = "unknown"
    CONFLICT = "conflict"


class LicenceVerdict(Schema):
    """What the licences of a base and its adapters say of their composition; no legal advice."""

    level: LicenceLevel
    reasons: tuple[str, ...] = ()


class Reason(Schema):
    """Why a verdict is what it is, and what a person can do about it."""

    code: str
    message: str
    remedy: str | None = None


class Verdict(Schema):
    """A compatibility level with its reasons."""

    level: Level
    reasons: tuple[Reason, ...] = ()


class LineageEvidence(Schema):
    """What the weights of two bases say of a line between them; tensors of one dimension are left out."""

    same_layout: bool = Field(description="the same names, shapes and number formats")
    tensors: int
    shared_tensors: int = Field(description="the same bits, or the same values in bf16")
    shared_parameters: float = Field(description="the share of parameters in these")


class LineageEdge(Schema):
    """A relative of a base, with the edge to its own parent."""

    name: str
    fingerprint: str
    depth: int = Field(description="edges between the two; 0 for a suggestion")
    parent: str | None
    relation: Relation | None
    evidence: LineageEvidence | None
    verified: bool = Field(description="whether it shares weights with its parent, bit for bit")


class LineageInfo(Schema):
    """The line of a base."""

    name: str
    ancestors: tuple[LineageEdge, ...]
    descendants: tuple[LineageEdge, ...]
    suggestions: tuple[LineageEdge, ...] = Field(description="bases with the same weights in part, and no line")


class Advice(Schema):
    """What the literature says against an adapter or a composition (registry.preflight); it refuses nothing."""

    code: str = Field(description="stable: programs may match it")
    adapter: str = Field(description="the adapter, or adapters, that it is about")
    message: str
    source: str = Field(description="the URL of the paper")

    def __str__(self) -> str:
        return f"{self.adapter}: {self.message} [{self.code}, {self.source}]"


class Score(Schema):
    """One number about an adapter or a composition (registry.screening), and where it begins to alarm."""

    code: str = Field(description="stable: programs may match it")
    value: float
    threshold: float
    alarm: bool
    where: str | None = Field(default=None, description="the tensor or the kinds of module that it is about")
    message: str
    source: str = Field(description="the URL of the paper")


class Screening(Schema):
    """All scores; they refuse nothing, and quiet ones prove nothing."""

    scores: tuple[Score, ...]
    population: int = Field(description="how many adapters of the base it was compared with")


class FileInfo(Schema):
    """One file of a version, a base or a composition."""

    name: str
    size: int
    sha256: str


TEMPLATE_DIFF = Field(
    default=None, description="unified diff from the base's chat templates to the adapter's; null where they are alike"
)


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
    license: str | None = None
    location: str = Field(description="the folder that it is read from; over REST empty for all but admins")
    parent: str | None = None
    relation: Relation | None = None
    created_at: datetime
    created: bool = Field(default=False, description="whether this call registered it")

    @field_serializer("location")
    def _place(self, location: str) -> str:
        return location if SHOWS_PLACES.get() else ""

    warnings: tuple[str, ...] = Field(default=(), description="what this call has to say of the files")


class SignatureInfo(Schema):
    """That somebody signed the files of a version; whether the key is to be trusted, its reader knows."""

    key: str = Field(description="sha256 of the public key in PEM")
    subject: str = Field(description="who attached it here")
    created_at: datetime


class SignedBundle(SignatureInfo):
    """A signature with its bundle, as model.sig holds it."""

    bundle: dict[str, Any]


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
    state: VersionState = VersionState.PUBLISHED
    state_reason: str | None = Field(default=None, description="why it was yanked or quarantined")
    deprecated: str | None = Field(default=None, description="why it should no longer be used")
    successor: str | None = Field(default=None, description="what to use in its place")
    private: bool = Field(default=False, description="whether only members of the namespace see it")
    task: str | None = Field(default=None, description="such as CAUSAL_LM")
    downloads: int = 0
    aliases: tuple[str, ...] = ()
    files: tuple[FileInfo, ...] = ()
    signatures: tuple[SignatureInfo, ...] = Field(default=(), description="first come, first named")
    screening: Screening | None = Field(default=None, description="as of now; null in listings")
    chat_template_diff: str | None = TEMPLATE_DIFF
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
    chat_template_diff: str | None = TEMPLATE_DIFF


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
    screening: Screening | None = None
    chat_template_diff: str | None = TEMPLATE_DIFF


class PlanInfo(Schema):
    """What a compose would do, computed from headers alone."""

    recipe: Recipe
    recipe_text: str
    base: str
    base_fingerprint: str
    adapters: tuple[PlannedAdapter, ...]
    accepted: bool
    licences: LicenceVerdict
    warnings: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = Field(default=(), description="what the literature says against it")
    screening: Screening | None = Field(default=None, description="of the sum of its adapters")
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
    screening: Screening | None = Field(default=None, description="of the sum of its adapters")
    published: str | None = Field(default=None, description="the base or the adapter that it was published as")
    record: dict[str, Any] = Field(default_factory=dict, description="composition.json")
    seconds: dict[str, float] = Field(default_factory=dict)


class ImportInfo(Schema):
    """What came from a hub: a version of an adapter, or a base."""

    source: str = Field(description="hf://org/name@commit")
    version: VersionInfo | None = None
    base: BaseInfo | None = None
    created: bool = Field(description="false when these very bytes were here already")
    warnings: tuple[str, ...] = ()


class ConversionInfo(Schema):
    """A LoRA that was extracted or resized."""

    out: str
    output_digest: str
    nbytes: int
    files: tuple[FileInfo, ...] = ()
    kept_energy: float = Field(description="share of the sum of squared singular values, over all modules")
    record: dict[str, Any] = Field(description="provenance.json")


class DeltaInfo(Schema):
    """A fine-tune stored as a delta, or restored from one."""

    out: str
    output_digest: str
    nbytes: int = Field(description="of the files written")
    files: tuple[FileInfo, ...] = ()
    checkpoint_nbytes: int = Field(description="of the weights that the delta stands for")
    tensors: int = Field(description="how many tensors differ from the base's")


class BaseCheck(Schema):
    """A registered base whose every tensor was hashed again."""

    name: str
    fingerprint: str
    found: str = Field(description="the fingerprint of what lies there now")
    intact: bool
    changed: tuple[str, ...] = Field(default=(), description="tensors that are not what was registered")


class Signed(Schema):
    """What was signed, and where its signature is."""

    ref: str = Field(description="the folder, or namespace/name@version")
    key: str = Field(description="sha256 of the public key in PEM")
    files: tuple[str, ...]
    bundle: str | None = Field(description="the file written; null for a signature that only the registry keeps")


class Verification(Schema):
    """A folder or a version that is what it claims to be: what is not raises an error in its place."""

    ref: str
    digest: str | None = Field(description="of all files, where there is a record of them")
    files: int
    signed_by: str | None = Field(default=None, description="the key asked for; null: no signature was asked for")
    unsigned: tuple[str, ...] = Field(default=(), description="files that are no part of the adapter beside them")
    attested: bool = Field(default=False, description="whether attestation.json is signed and agrees")
    rebuilt: bool = Field(default=False, description="whether composing it again gave the same bytes")


JobResult = CompositionInfo | ConversionInfo | DeltaInfo | ImportInfo | BaseInfo | BaseCheck | PublishResult


class JobInfo(Schema):
    """A piece of work that runs in the background."""

    id: str
    kind: str = Field(
        description="compose, publication, import, base (register), verify, extract, resize, delta or restore"
    )
    title: str = Field(description="the recipe, or the names of what is read")
    state: JobState
    recipe: Recipe | None = None
    step: str = ""
    owner: str = Field(description="who submitted it first")
    bytes_done: int = 0
    bytes_total: int = 0
    attempts: int = 0
    error: dict[str, Any] | None = None
    result: JobResult | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


class TokenInfo(Schema):
    """An API token, without its secret."""

    id: str
    name: str
    subject: str
    scopes: tuple[Scope, ...]
    namespaces: tuple[str, ...] | None = Field(description="the only ones it is good for; null: no limit")
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None = None
    last_used_at: datetime | None = Field(default=None, description="to the minute")


class NewToken(Schema):
    """A token that was just made: the only time that its secret is shown."""

    token: str
    info: TokenInfo


class Member(Schema):
    """What a subject is in a namespace."""

    subject: str
    role: Role


class NamespaceInfo(Schema):
    """A namespace and its members."""

    name: str
    members: tuple[Member, ...]


class AuditEntry(Schema):
    """One line of the audit log."""

    id: int
    at: datetime
    subject: str
    token: str | None
    action: str
    target: str
    detail: dict[str, Any] = Field(default_factory=dict)


class Collected(Schema):
    """What a collection removed, or with `dry_run` would remove."""

    dry_run: bool
    blobs: int = Field(description="stored files that no version names")
    uploads: int = Field(description="uploads that became no base")
    compositions: int = Field(description="outputs of jobs, and what was left half-written")
    jobs: int = Field(description="jobs that ended long ago")
    records: int = Field(description="records of compositions made long ago")
    nbytes: int


class Readiness(Schema):
    """Whether requests can be served."""

    ready: bool = Field(description="all of the following")
    database: bool = Field(description="it answers")
    migrations: bool = Field(description="its schema is the one that this version expects")
    store: bool = Field(description="it takes files")


class Damage(Schema):
    """A stored file, or an entry of the catalogue, that is not what it was."""

    kind: str = Field(description="blob, base, composition, xorb, graph, list, entry or database")
    name: str
    path: str = Field(description="empty for an entry of the catalogue")
    expected: str
    found: str
    used_by: tuple[str, ...] = ()
    tensors: tuple[str, ...] = Field(default=(), description="those that lie in the damaged parts, as far as is known")
    restored: str | None = Field(default=None, description="from what, by a repair")
    remedy: str | None = None


class StoreCheck(Schema):
    """What hashing everything that is stored has found."""

    files: int
    nbytes: int
    damaged: tuple[Damage, ...] = ()


class DoctorCheck(Schema):
    """One line of `registry doctor`."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None

"""The catalogue's tables. Constraints live here, in the database, so that no code path can break them.

    base_models ── base_files, base_tensors (leaves), parent and base_closure (lineage)
    adapters ── adapter_versions ── version_files, version_tags, version_downloads, signature ── signature_targets
             └─ aliases ──┘
    repositories ── commits ── commit_files       what was pushed through the Hub's protocol; published commits
                 └─ refs ────────┘                name their version or base; received: who sent which bytes
    jobs            what runs in the background: one a compose, a base to fingerprint …
    tokens          who may ask; members: what a subject is in a namespace; audit_log: who changed what
    attestations    signed bundles over the files of a version, one a key
    compositions    one a finished recipe over known inputs (composition_inputs): cache key and proof
    quarantine      bytes that nobody may use; tombstones: versions that were deleted

Times are UTC. Digests are lower-case hex, with their scheme where a user sees them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

__all__ = [
    "AdapterRow",
    "AliasRow",
    "AttestationRow",
    "AuditRow",
    "BaseClosureRow",
    "BaseFileRow",
    "BaseModelRow",
    "BaseTensorRow",
    "CommitFileRow",
    "CommitRow",
    "CompositionInputRow",
    "CompositionRow",
    "JobRow",
    "MemberRow",
    "Model",
    "QuarantineRow",
    "ReceivedRow",
    "RefRow",
    "RepositoryRow",
    "SignatureRow",
    "SignatureTargetRow",
    "TokenRow",
    "TombstoneRow",
    "VersionDownloadsRow",
    "VersionFileRow",
    "VersionRow",
    "VersionTagRow",
]

# SQLite only numbers INTEGER primary keys by itself.
Key = BigInteger().with_variant(Integer, "sqlite")
# Ordered by bytes in every database, whatever its locale.
SortText = String(300).with_variant(String(300, collation="C"), "postgresql")


class UtcDateTime(TypeDecorator[datetime]):
    """A time in UTC; SQLite keeps no zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        """Always aware, always UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    """The current time in UTC."""
    return datetime.now(UTC)


class Model(DeclarativeBase):
    """Base of all tables; constraint names are fixed so that migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class BaseModelRow(Model):
    """A registered base model."""

    __tablename__ = "base_models"
    __table_args__ = (
        CheckConstraint("relation IN ('finetune', 'quantized', 'merged', 'resized')", name="relation"),
        CheckConstraint("(parent_id IS NULL) = (relation IS NULL)", name="lineage"),
        CheckConstraint("parent_id <> id", name="not_own_parent"),
        CheckConstraint("fingerprint LIKE 'wf1:%' AND length(fingerprint) = 68", name="fingerprint"),
        Index("ix_base_models_values", "value_root", "config_digest"),
    )

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    fingerprint: Mapped[str] = mapped_column(String(68), unique=True)
    tensor_root: Mapped[str] = mapped_column(String(64))
    value_root: Mapped[str] = mapped_column(String(64))
    layout_digest: Mapped[str] = mapped_column(String(64))
    config_digest: Mapped[str] = mapped_column(String(64))
    tokenizer_digest: Mapped[str | None] = mapped_column(String(64))
    chat_template_digest: Mapped[str | None] = mapped_column(String(64))
    architecture: Mapped[str] = mapped_column(String(200))
    dtype: Mapped[str] = mapped_column(String(20))
    parameters: Mapped[int] = mapped_column(BigInteger)
    nbytes: Mapped[int] = mapped_column(BigInteger)
    location: Mapped[str] = mapped_column(Text)
    license: Mapped[str | None] = mapped_column(String(100))
    # The digests of the adapters that are merged into it, where it was composed here.
    made_of: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("base_models.id", ondelete="RESTRICT"), index=True)
    relation: Mapped[str | None] = mapped_column(String(20))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)

    parent: Mapped[BaseModelRow | None] = relationship(remote_side=[id], lazy="joined", join_depth=1)
    files: Mapped[list[BaseFileRow]] = relationship(cascade="all, delete-orphan", order_by="BaseFileRow.name")
    tensors: Mapped[list[BaseTensorRow]] = relationship(cascade="all, delete-orphan", order_by="BaseTensorRow.name")


class BaseFileRow(Model):
    """One file of a base, with the stat that tells whether it must be hashed again."""

    __tablename__ = "base_files"
    __table_args__ = (CheckConstraint("size >= 0", name="size"),)

    base_id: Mapped[int] = mapped_column(ForeignKey("base_models.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(500), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    mtime_ns: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class BaseClosureRow(Model):
    """A pair of an ancestor and a descendant, and how many edges lie between them."""

    __tablename__ = "base_closure"
    __table_args__ = (
        CheckConstraint("depth > 0", name="depth"),
        Index("ix_base_closure_descendant", "descendant_id", "depth"),
    )

    ancestor_id: Mapped[int] = mapped_column(ForeignKey("base_models.id", ondelete="CASCADE"), primary_key=True)
    descendant_id: Mapped[int] = mapped_column(ForeignKey("base_models.id", ondelete="CASCADE"), primary_key=True)
    depth: Mapped[int] = mapped_column(Integer)


class BaseTensorRow(Model):
    """One leaf of a fingerprint."""

    __tablename__ = "base_tensors"
    __table_args__ = (Index("ix_base_tensors_digest", "digest"),)

    base_id: Mapped[int] = mapped_column(ForeignKey("base_models.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(1024), primary_key=True)
    dtype: Mapped[str] = mapped_column(String(20))
    shape: Mapped[list[int]] = mapped_column(JSON)
    digest: Mapped[str] = mapped_column(String(64))
    value_digest: Mapped[str] = mapped_column(String(64))


class AdapterRow(Model):
    """A name that versions live under. `downloads`: of all of them, those that were deleted too."""

    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("namespace", "name"),
        Index("ix_adapters_private", "namespace", sqlite_where=text("private = 1"), postgresql_where=text("private")),
        Index("ix_adapters_downloads", "downloads", "id"),
    )

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    namespace: Mapped[str] = mapped_column(String(100))
    name: Mapped[str] = mapped_column(String(100))
    private: Mapped[bool] = mapped_column(default=False)
    downloads: Mapped[int] = mapped_column(BigInteger, default=0)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)

    versions: Mapped[list[VersionRow]] = relationship(back_populates="adapter", cascade="all, delete-orphan")
    aliases: Mapped[list[AliasRow]] = relationship(back_populates="adapter", cascade="all, delete-orphan")

    @property
    def full_name(self) -> str:
        """namespace/name"""
        return f"{self.namespace}/{self.name}"


# Indexes of the latest versions only: pages of them, newest first, are read from one. SQLite uses a partial index only
# where its condition stands in the query as it stands here, and there a boolean is written `latest = 1`.
LATEST_BY = {
    "base": ("base_fingerprint",),
    "values": ("base_value_root", "base_config_digest"),
    "signature": ("signature",),
    "kind": ("kind",),
    "task": ("task",),
    "id": (),
}


class VersionRow(Model):
    """One immutable version. `sort_key` orders semantic versions as text."""

    __tablename__ = "adapter_versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "version"),
        CheckConstraint("digest LIKE 'sha256:%' AND length(digest) = 71", name="digest"),
        CheckConstraint("base_fingerprint LIKE 'wf1:%' AND length(base_fingerprint) = 68", name="base_fingerprint"),
        Index("ix_adapter_versions_latest", "adapter_id", "prerelease", "sort_key"),
        Index("ix_adapter_versions_base", "base_fingerprint", "id"),
        *(
            Index(f"ix_latest_{name}", *columns, "id", sqlite_where=text("latest = 1"), postgresql_where=text("latest"))
            for name, columns in LATEST_BY.items()
        ),
        Index("ix_adapter_versions_digest", "digest"),
        CheckConstraint("state IN ('published', 'yanked', 'quarantined')", name="state"),
        CheckConstraint("(state = 'published') = (state_reason IS NULL)", name="state_reason"),
        CheckConstraint("NOT latest OR state = 'published'", name="latest"),
        Index(
            "uq_adapter_versions_latest", "adapter_id", unique=True,
            sqlite_where=text("latest = 1"), postgresql_where=text("latest"),
        ),
    )  # fmt: skip

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="RESTRICT"))
    version: Mapped[str] = mapped_column(String(100))
    sort_key: Mapped[str] = mapped_column(SortText)
    prerelease: Mapped[bool]
    digest: Mapped[str] = mapped_column(String(71))
    kind: Mapped[str] = mapped_column(String(50), index=True)
    rank: Mapped[int | None] = mapped_column(Integer)
    alpha: Mapped[float | None]
    target_modules: Mapped[list[str]] = mapped_column(JSON)
    parameters: Mapped[int] = mapped_column(BigInteger)
    nbytes: Mapped[int] = mapped_column(BigInteger)
    base_fingerprint: Mapped[str | None] = mapped_column(String(68))
    base_value_root: Mapped[str | None] = mapped_column(String(64))
    base_config_digest: Mapped[str | None] = mapped_column(String(64))
    base_name: Mapped[str | None] = mapped_column(String(500))
    license: Mapped[str | None] = mapped_column(String(100))
    tags: Mapped[list[str]] = mapped_column(JSON)
    description: Mapped[str] = mapped_column(Text, default="")
    search_text: Mapped[str] = mapped_column(Text, deferred=True)  # which is looked up, not shown
    # The digest of a SignatureRow; no foreign key, because SQLite cannot drop a column that has one.
    signature: Mapped[str | None] = mapped_column(String(64))
    task: Mapped[str | None] = mapped_column(String(50))
    # What composer.screening measured, for the population that later adapters of this base are compared with.
    screening: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    latest: Mapped[bool] = mapped_column(default=False)
    state: Mapped[str] = mapped_column(String(20), default="published")
    state_reason: Mapped[str | None] = mapped_column(Text)
    deprecated: Mapped[str | None] = mapped_column(Text)
    successor: Mapped[str | None] = mapped_column(String(300))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)

    adapter: Mapped[AdapterRow] = relationship(back_populates="versions", lazy="joined")
    files: Mapped[list[VersionFileRow]] = relationship(cascade="all, delete-orphan", order_by="VersionFileRow.name")
    labels: Mapped[list[VersionTagRow]] = relationship(cascade="all, delete-orphan")


class VersionFileRow(Model):
    """One file of a version: its bytes are the blob of that sha256."""

    __tablename__ = "version_files"
    __table_args__ = (CheckConstraint("size >= 0", name="size"), Index("ix_version_files_sha256", "sha256"))

    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_versions.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(500), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class SignatureRow(Model):
    """What an adapter touches, named by its digest: many versions share one."""

    __tablename__ = "signatures"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)

    targets: Mapped[list[SignatureTargetRow]] = relationship(cascade="all, delete-orphan")


class SignatureTargetRow(Model):
    """One base parameter of a signature, with what it needs: sizes, then conditions on them as texts."""

    __tablename__ = "signature_targets"

    signature: Mapped[str] = mapped_column(ForeignKey("signatures.digest", ondelete="CASCADE"), primary_key=True)
    parameter: Mapped[str] = mapped_column(String(1024), primary_key=True)
    shape: Mapped[list[int | str]] = mapped_column(JSON)


class VersionTagRow(Model):
    """One tag of a version."""

    __tablename__ = "version_tags"
    __table_args__ = (Index("ix_version_tags_version", "version_id"),)

    tag: Mapped[str] = mapped_column(String(200), primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_versions.id", ondelete="CASCADE"), primary_key=True)


class VersionDownloadsRow(Model):
    """How often a version was downloaded; apart, so that counting does not rewrite wide rows."""

    __tablename__ = "version_downloads"
    __table_args__ = (CheckConstraint("count > 0", name="count"),)

    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_versions.id", ondelete="CASCADE"), primary_key=True)
    count: Mapped[int] = mapped_column(BigInteger)


class AttestationRow(Model):
    """A signed bundle that lists the files of a version; whether a key is to be trusted is for its reader to say."""

    __tablename__ = "attestations"
    __table_args__ = (CheckConstraint("length(key) = 64", name="key"),)

    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_versions.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    bundle: Mapped[dict[str, Any]] = mapped_column(JSON)
    subject: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class AliasRow(Model):
    """A movable name of a version; `latest` is not stored, it follows the highest version by itself."""

    __tablename__ = "aliases"
    __table_args__ = (CheckConstraint("alias <> 'latest'", name="not_latest"),)

    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    alias: Mapped[str] = mapped_column(String(100), primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_versions.id", ondelete="RESTRICT"), index=True)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now, onupdate=now)

    adapter: Mapped[AdapterRow] = relationship(back_populates="aliases")
    version: Mapped[VersionRow] = relationship()


class JobRow(Model):
    """One long piece of work. A running job has a worker and a lease; a worker that is late with it loses the job."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"),
        CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name="lease"),
        CheckConstraint("(worker IS NULL) = (lease_until IS NULL)", name="worker"),
        Index("ix_jobs_state_created", "state", "created_at"),
        Index("ix_jobs_key", "key", "created_at"),
        Index(
            "uq_jobs_active_key", "key", unique=True,
            sqlite_where=text("state IN ('queued', 'running')"),
            postgresql_where=text("state IN ('queued', 'running')"),
        ),
    )  # fmt: skip

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str] = mapped_column(String(30))
    title: Mapped[str] = mapped_column(Text)
    owner: Mapped[str] = mapped_column(String(200))
    key: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(20), default="queued")
    request: Mapped[dict[str, Any]] = mapped_column(JSON)
    step: Mapped[str] = mapped_column(String(200), default="")
    bytes_done: Mapped[int] = mapped_column(BigInteger, default=0)
    bytes_total: Mapped[int] = mapped_column(BigInteger, default=0)
    nbytes: Mapped[int] = mapped_column(BigInteger, default=0)  # on the service's disk: planned, then written
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    worker: Mapped[str | None] = mapped_column(String(200))
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    cancelling: Mapped[bool] = mapped_column(default=False)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class TokenRow(Model):
    """An API token: what it is good for, and the sha256 of its secret."""

    __tablename__ = "tokens"
    __table_args__ = (CheckConstraint("length(digest) = 64", name="digest"),)

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    subject: Mapped[str] = mapped_column(String(200), index=True)
    scopes: Mapped[list[str]] = mapped_column(JSON)
    namespaces: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class MemberRow(Model):
    """What a subject is in a namespace."""

    __tablename__ = "members"
    __table_args__ = (
        CheckConstraint("role IN ('reader', 'publisher', 'owner')", name="role"),
        Index("ix_members_subject", "subject", "namespace"),
    )

    namespace: Mapped[str] = mapped_column(String(100), primary_key=True)
    subject: Mapped[str] = mapped_column(String(200), primary_key=True)
    role: Mapped[str] = mapped_column(String(20))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class AuditRow(Model):
    """Who changed what; written with the change, never altered."""

    __tablename__ = "audit_log"
    __table_args__ = (Index("ix_audit_log_subject", "subject", "id"), Index("ix_audit_log_target", "target", "id"))

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    subject: Mapped[str] = mapped_column(String(200))
    token: Mapped[str | None] = mapped_column(String(12))
    action: Mapped[str] = mapped_column(String(50))
    target: Mapped[str] = mapped_column(String(500))
    detail: Mapped[dict[str, Any]] = mapped_column(JSON)


class CompositionRow(Model):
    """A finished composition: recipe and input digests to output digest."""

    __tablename__ = "compositions"
    __table_args__ = (CheckConstraint("output_digest LIKE 'sha256:%'", name="output_digest"),)

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    recipe: Mapped[dict[str, Any]] = mapped_column(JSON)
    inputs: Mapped[dict[str, Any]] = mapped_column(JSON)
    output_digest: Mapped[str] = mapped_column(String(71))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)

    parts: Mapped[list[CompositionInputRow]] = relationship(cascade="all, delete-orphan")


class CompositionInputRow(Model):
    """One thing that a composition was made of: the fingerprint of its base, or the digest of an adapter."""

    __tablename__ = "composition_inputs"

    composition_id: Mapped[int] = mapped_column(ForeignKey("compositions.id", ondelete="CASCADE"), primary_key=True)
    digest: Mapped[str] = mapped_column(String(71), primary_key=True, index=True)


class QuarantineRow(Model):
    """Bytes that nobody may use, whatever names them."""

    __tablename__ = "quarantine"
    __table_args__ = (CheckConstraint("digest LIKE 'sha256:%' AND length(digest) = 71", name="digest"),)

    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    reason: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class TombstoneRow(Model):
    """A version that was deleted: its name is never given again."""

    __tablename__ = "tombstones"

    namespace: Mapped[str] = mapped_column(String(100), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    version: Mapped[str] = mapped_column(String(100), primary_key=True)
    digest: Mapped[str] = mapped_column(String(71))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class RepositoryRow(Model):
    """A repository of the Hub's protocol that was created or pushed to. Adapters and bases are repositories without.

    private: as the adapter of that name is, or will be.
    """

    __tablename__ = "repositories"
    __table_args__ = (UniqueConstraint("namespace", "name"),)

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    namespace: Mapped[str] = mapped_column(String(100))
    name: Mapped[str] = mapped_column(String(100))
    private: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)

    @property
    def full_name(self) -> str:
        """``namespace/name``, or the name alone of a base that has no namespace."""
        return f"{self.namespace}/{self.name}".removeprefix("/")


class CommitRow(Model):
    """One state of a repository's files; `oid` follows from them. One without version and base is a draft."""

    __tablename__ = "commits"
    __table_args__ = (
        UniqueConstraint("repository_id", "oid"),
        CheckConstraint("length(oid) = 40", name="oid"),
        CheckConstraint("version_id IS NULL OR base_id IS NULL", name="one_noun"),
    )

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    repository_id: Mapped[int] = mapped_column(ForeignKey("repositories.id", ondelete="CASCADE"))
    oid: Mapped[str] = mapped_column(String(40))
    parent: Mapped[str | None] = mapped_column(String(40))
    title: Mapped[str] = mapped_column(String(500))
    message: Mapped[str] = mapped_column(Text, default="")
    version_id: Mapped[int | None] = mapped_column(ForeignKey("adapter_versions.id", ondelete="CASCADE"), index=True)
    base_id: Mapped[int | None] = mapped_column(ForeignKey("base_models.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)

    files: Mapped[list[CommitFileRow]] = relationship(cascade="all, delete-orphan", order_by="CommitFileRow.path")


class CommitFileRow(Model):
    """One file of a commit: its bytes are the blob of that sha256."""

    __tablename__ = "commit_files"
    __table_args__ = (CheckConstraint("size >= 0", name="size"), Index("ix_commit_files_sha256", "sha256"))

    commit_id: Mapped[int] = mapped_column(ForeignKey("commits.id", ondelete="CASCADE"), primary_key=True)
    path: Mapped[str] = mapped_column(String(500), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class ReceivedRow(Model):
    """A subject has sent the bytes of this digest (a blob's sha256 or a xorb's hash), so it may name them in a push."""

    __tablename__ = "received"

    subject: Mapped[str] = mapped_column(String(200), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class RefRow(Model):
    """A branch, or a tag on something that is no adapter; tags on adapters are their versions and aliases."""

    __tablename__ = "refs"
    __table_args__ = (CheckConstraint("kind IN ('branch', 'tag')", name="kind"),)

    repository_id: Mapped[int] = mapped_column(ForeignKey("repositories.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(10), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    commit_id: Mapped[int] = mapped_column(ForeignKey("commits.id", ondelete="CASCADE"), index=True)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now, onupdate=now)

    commit: Mapped[CommitRow] = relationship()

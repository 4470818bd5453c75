"""The catalogue's tables. Constraints live here, in the database, so that no code path can break them.

    base_models ── base_files, base_tensors (leaves), parent (lineage)
    adapters ── adapter_versions ── version_files, version_targets (signature)
             └─ aliases ──┘
    repositories ── commits ── commit_files       what was pushed through the Hub's protocol; published commits
                 └─ refs ────────┘                name their version or base
    jobs            one a compose on the service
    compositions    one a finished recipe over known inputs: cache key and proof

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
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

__all__ = [
    "AdapterRow",
    "AliasRow",
    "BaseFileRow",
    "BaseModelRow",
    "BaseTensorRow",
    "CommitFileRow",
    "CommitRow",
    "CompositionRow",
    "JobRow",
    "Model",
    "RefRow",
    "RepositoryRow",
    "VersionFileRow",
    "VersionRow",
    "VersionTargetRow",
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
    """A name that versions live under."""

    __tablename__ = "adapters"
    __table_args__ = (UniqueConstraint("namespace", "name"),)

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    namespace: Mapped[str] = mapped_column(String(100))
    name: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)

    versions: Mapped[list[VersionRow]] = relationship(back_populates="adapter", cascade="all, delete-orphan")
    aliases: Mapped[list[AliasRow]] = relationship(back_populates="adapter", cascade="all, delete-orphan")

    @property
    def full_name(self) -> str:
        """namespace/name"""
        return f"{self.namespace}/{self.name}"


class VersionRow(Model):
    """One immutable version. `sort_key` orders semantic versions as text."""

    __tablename__ = "adapter_versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "version"),
        CheckConstraint("digest LIKE 'sha256:%' AND length(digest) = 71", name="digest"),
        CheckConstraint("base_fingerprint LIKE 'wf1:%' AND length(base_fingerprint) = 68", name="base_fingerprint"),
        Index("ix_adapter_versions_latest", "adapter_id", "prerelease", "sort_key"),
        Index("ix_adapter_versions_base", "base_fingerprint", "created_at", "id"),
        Index("ix_adapter_versions_digest", "digest"),
    )

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
    search_text: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)

    adapter: Mapped[AdapterRow] = relationship(back_populates="versions", lazy="joined")
    files: Mapped[list[VersionFileRow]] = relationship(cascade="all, delete-orphan", order_by="VersionFileRow.name")
    targets: Mapped[list[VersionTargetRow]] = relationship(cascade="all, delete-orphan")


class VersionFileRow(Model):
    """One file of a version: its bytes are the blob of that sha256."""

    __tablename__ = "version_files"
    __table_args__ = (CheckConstraint("size >= 0", name="size"), Index("ix_version_files_sha256", "sha256"))

    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_versions.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(500), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class VersionTargetRow(Model):
    """One base parameter that a version touches, with the shape it needs."""

    __tablename__ = "version_targets"

    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_versions.id", ondelete="CASCADE"), primary_key=True)
    parameter: Mapped[str] = mapped_column(String(1024), primary_key=True)
    shape: Mapped[list[int]] = mapped_column(JSON)


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
    """A compose that runs on the service."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"),
        Index("ix_jobs_state_created", "state", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    state: Mapped[str] = mapped_column(String(20), default="queued")
    recipe: Mapped[dict[str, Any]] = mapped_column(JSON)
    step: Mapped[str] = mapped_column(String(200), default="")
    bytes_done: Mapped[int] = mapped_column(BigInteger, default=0)
    bytes_total: Mapped[int] = mapped_column(BigInteger, default=0)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


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


class RepositoryRow(Model):
    """A repository of the Hub's protocol that was created or pushed to. Adapters and bases are repositories without."""

    __tablename__ = "repositories"
    __table_args__ = (UniqueConstraint("namespace", "name"),)

    id: Mapped[int] = mapped_column(Key, primary_key=True)
    namespace: Mapped[str] = mapped_column(String(100))
    name: Mapped[str] = mapped_column(String(100))
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

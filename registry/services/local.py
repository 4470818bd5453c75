"""The registry on this machine: all services behind one object.

open_registry()  ->  LocalRegistry (registry.interface.Registry)
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from composer.recipe import Recipe, split_reference
from composer.sinks import storage_errors
from registry.access import LOCAL, Principal, Role, Scope
from registry.db import create_database_engine, migrate, session_scope
from registry.interface import DEFAULT_DAYS, DEFAULT_MAX_BYTES, DEFAULT_PAGE, GRACE_DAYS, KEEP_JOBS_DAYS, Progress
from registry.lifecycle import require_usable
from registry.schemas import (
    AuditEntry,
    BaseCheck,
    BaseFit,
    BaseInfo,
    Collected,
    CompatibleAdapter,
    CompositionInfo,
    ConversionInfo,
    DeltaInfo,
    DoctorCheck,
    ImportInfo,
    JobInfo,
    JobState,
    Level,
    LineageInfo,
    NamespaceInfo,
    NewToken,
    Page,
    PlanInfo,
    PublishResult,
    Readiness,
    Relation,
    SignatureInfo,
    SignedBundle,
    StoreCheck,
    TokenInfo,
    Verdict,
    VersionInfo,
)
from registry.services.audit import AuditLog
from registry.services.catalogue import Catalogue
from registry.services.collection import Collection
from registry.services.composed import Composed, published_name, require_publication
from registry.services.compositions import Compositions, Prepared
from registry.services.conversions import Conversions
from registry.services.diagnosis import diagnose
from registry.services.downloads import Downloads
from registry.services.importing import Importing, ImportRules
from registry.services.inspection import Inspection
from registry.services.integrity import check_store
from registry.services.jobs import JobService
from registry.services.lifecycle import Lifecycle
from registry.services.lineage import Lineage
from registry.services.matching import Matching
from registry.services.namespaces import Namespaces
from registry.services.publishing import Publishing
from registry.services.pushing import Pushing
from registry.services.readiness import ReadinessProbe
from registry.services.received import Received
from registry.services.repositories import Repositories
from registry.services.repository_admin import RepositoryAdmin
from registry.services.search import Query, Search
from registry.services.signatures import Signatures
from registry.services.templates import with_template_diff
from registry.services.tokens import TokenAuthenticator, Tokens
from registry.services.visibility import hide_private
from registry.store.layout import Layout, default_home
from registry.store.local import LocalStore
from registry.store.pulling import pull_files, signature_files

__all__ = ["LocalRegistry", "open_registry"]

assert hide_private  # it listens to every session of these services


def open_registry(home: Path | None = None, database_url: str | None = None) -> LocalRegistry:
    """The registry under `home` (default REGISTRY_HOME), made and migrated as needed."""
    layout = Layout((home or default_home()).expanduser().resolve())
    with storage_errors(f"opening {layout.home}"):
        layout.home.mkdir(parents=True, exist_ok=True)
    engine = create_database_engine(database_url or os.environ.get("REGISTRY_DATABASE_URL") or layout.database_url)
    migrate(engine)
    return LocalRegistry(layout, engine)


class LocalRegistry:
    """Services over one database, which is migrated, and one store."""

    def __init__(self, layout: Layout, engine: Engine) -> None:
        self.layout = layout
        self.engine = engine
        self.store = LocalStore(layout)
        self._catalogue = Catalogue(self.engine)
        self._publishing = Publishing(self.engine, self.store)
        self._compositions = Compositions(self.engine, self.store, layout)
        self._conversions = Conversions(self.engine, self.store, self._compositions)
        self.repositories = Repositories(self.engine, self.store)
        self.pushing = Pushing(self.engine, self.store, layout, self._publishing)
        self.repository_admin = RepositoryAdmin(self.engine, self._catalogue, self.pushing)
        self.received = Received(self.engine)
        self._importing = Importing(layout, self._publishing)
        self._composed = Composed(self.engine, layout, self._publishing)
        self._inspection = Inspection(self.engine, self.store)
        self._jobs = JobService(self, slots=0, imports=ImportRules(token=True, private=True, max_bytes=1 << 62))
        self._namespaces = Namespaces(self.engine)
        self._search = Search(self.engine)
        self._lineage = Lineage(self.engine)
        self._matching = Matching(self.engine)
        self._lifecycle = Lifecycle(self.engine)
        self._collection = Collection(self.engine, layout)
        self._audit = AuditLog(self.engine)
        self._signatures = Signatures(self.engine)
        self.tokens = Tokens(self.engine)
        self.downloads = Downloads(self.engine)
        self._readiness = ReadinessProbe(self.engine, layout)

    def acting_as(self, principal: Principal) -> LocalRegistry:
        """The same registry as `principal` may see and change it."""
        if principal is LOCAL:
            return self
        other = LocalRegistry(self.layout, self.engine.execution_options(principal=principal))
        other._jobs = self._jobs.over(other, principal)
        other.downloads = self.downloads
        return other

    def authenticator(self) -> TokenAuthenticator:
        """What recognises the tokens of this registry."""
        return TokenAuthenticator(self.engine)

    @property
    def home(self) -> Path:
        """The folder of everything that is not in the database."""
        return self.layout.home

    def readiness(self) -> Readiness:
        """Whether requests can be served."""
        return self._readiness.check()

    def close(self) -> None:
        """Write what was counted and release the database."""
        self.downloads.write()
        self.engine.dispose()

    def add_base(
        self,
        folder: Path,
        *,
        name: str | None = None,
        parent: str | None = None,
        relation: Relation | None = None,
        license: str | None = None,
        progress: Progress | None = None,
    ) -> BaseInfo:
        return self._publishing.add_base(folder, name, parent, relation, license, progress)

    def remove_base(self, ref: str) -> None:
        self._lifecycle.remove_base(ref)

    def yank(self, ref: str, reason: str | None) -> VersionInfo:
        return self._lifecycle.yank(*split_reference(ref), reason)

    def deprecate(self, ref: str, reason: str | None, *, successor: str | None = None) -> VersionInfo:
        return self._lifecycle.deprecate(*split_reference(ref), reason, successor)

    def quarantine(self, ref: str, reason: str | None) -> tuple[VersionInfo, ...]:
        return self._lifecycle.quarantine(*split_reference(ref), reason)

    def delete_version(self, ref: str) -> None:
        self._lifecycle.delete(*split_reference(ref))

    def collect(
        self,
        *,
        grace_days: float = GRACE_DAYS,
        keep_jobs_days: float = KEEP_JOBS_DAYS,
        keep_records_days: float | None = None,
        dry_run: bool = False,
    ) -> Collected:
        records = None if keep_records_days is None else timedelta(days=keep_records_days)
        return self._collection.collect(timedelta(days=grace_days), timedelta(days=keep_jobs_days), records, dry_run)

    def list_bases(self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[BaseInfo]:
        return self._catalogue.list_bases(limit, cursor)

    def get_base(self, ref: str) -> BaseInfo:
        return self._catalogue.get_base(ref)

    def verify_base(self, ref: str, *, progress: Progress | None = None) -> BaseCheck:
        return self._publishing.verify_base(ref, progress)

    def publish(
        self,
        folder: Path,
        *,
        name: str,
        version: str | None = None,
        base: str | None = None,
        license: str | None = None,
        tags: tuple[str, ...] = (),
        description: str | None = None,
        private: bool | None = None,
        allow_nonfinite: bool = False,
        progress: Progress | None = None,
        read_paths: bool = True,
    ) -> PublishResult:
        """As the protocol says; `read_paths=False` for uploads: paths in them are not looked up on this machine."""
        return self._publishing.publish(
            folder, name, version, base, license, tags, description, private, progress, read_paths=read_paths,
            allow_nonfinite=allow_nonfinite,
        )  # fmt: skip

    def import_model(
        self,
        ref: str,
        *,
        name: str | None = None,
        version: str | None = None,
        base: str | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        allow_private: bool = False,
        progress: Progress | None = None,
        token: bool = True,
        refused: str | None = None,
    ) -> ImportInfo:
        """As the protocol says; `token` and `refused` as in Importing, for what a service was asked to fetch."""
        return self._importing.import_model(
            ref,
            name=name,
            version=version,
            base=base,
            max_bytes=max_bytes,
            allow_private=allow_private,
            progress=progress,
            token=token,
            refused=refused,
        )

    def submit_import(
        self,
        ref: str,
        *,
        name: str | None = None,
        version: str | None = None,
        base: str | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        allow_private: bool = False,
    ) -> JobInfo:
        words = {"name": name, "version": version, "base": base, "max_bytes": max_bytes}
        return self._jobs.submit_import(ref, **words, allow_private=allow_private)

    def list_adapters(
        self,
        *,
        namespace: str | None = None,
        kind: str | None = None,
        base: str | None = None,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
    ) -> Page[VersionInfo]:
        return self._catalogue.list_adapters(limit, cursor, namespace=namespace, kind=kind, base=base)

    def search(
        self,
        text: str = "",
        *,
        namespace: str | None = None,
        kind: str | None = None,
        rank: int | None = None,
        task: str | None = None,
        license: str | None = None,
        base: str | None = None,
        tag: str | None = None,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
    ) -> Page[VersionInfo]:
        query = Query(text, namespace, kind, rank, task, license, base, tag)
        return self._search.page(query, limit, cursor)

    def lineage(self, base: str) -> LineageInfo:
        return self._lineage.get(base)

    def get_version(self, ref: str) -> VersionInfo:
        return with_template_diff(self.engine, self.store, self._catalogue.screened_version(*split_reference(ref)))

    def list_versions(self, name: str, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[VersionInfo]:
        return self._catalogue.list_versions(name, limit, cursor)

    def set_alias(self, ref: str, alias: str) -> VersionInfo:
        return self._catalogue.set_alias(*split_reference(ref), alias)

    def delete_alias(self, name: str, alias: str) -> None:
        self._catalogue.delete_alias(name, alias)

    def usable_version(self, ref: str) -> VersionInfo:
        """A version whose bytes may be used. Raises YankedError and QuarantinedError."""
        name, version = split_reference(ref)
        info = self._catalogue.get_version(name, version)
        require_usable(info, f"{info.name}@{info.version}", version)
        return info

    def version_files(self, ref: str) -> dict[str, Path]:
        """The files of a version that may be used: name to blob, each present."""
        return {file.name: self.store.path(file.sha256) for file in self.usable_version(ref).files}

    def pull(self, ref: str, out: Path, *, progress: Progress | None = None) -> VersionInfo:
        info = self.usable_version(ref)
        pull_files(self.store, info.files, out, progress, signature_files(info, self.signatures(ref)))
        self.count_download(info)
        return info

    def signatures(self, ref: str) -> tuple[SignedBundle, ...]:
        return self._signatures.list(*split_reference(ref))

    def add_signature(self, ref: str, bundle: dict[str, Any]) -> SignatureInfo:
        return self._signatures.add(*split_reference(ref), bundle)

    def count_download(self, info: VersionInfo) -> None:
        """One download of this version more; counts are written every few seconds, and when the registry is closed."""
        self.downloads.count(self._catalogue.version_id(info.name, info.version))

    def compatible(
        self, base: str, *, level: Level = Level.SHAPE, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[CompatibleAdapter]:
        return self._matching.compatible(base, level, limit, cursor)

    def bases_for(
        self, ref: str, *, level: Level = Level.SHAPE, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[BaseFit]:
        return self._matching.bases_for(*split_reference(ref), level, limit, cursor)

    def check(self, adapter: str, base: str) -> Verdict:
        return self._compositions.check(adapter, base)

    def plan(self, recipe: Recipe) -> PlanInfo:
        return self._compositions.plan(recipe)

    def prepare(self, recipe: Recipe, *, accept_licences: bool = False, probe: str | None = None) -> Prepared:
        """A plan that compose will follow: refused where compose would refuse, with its key and pinned versions."""
        return self._compositions.prepare(recipe, accept_licences, probe)

    def compose(
        self,
        recipe: Recipe,
        out: Path,
        *,
        replace: bool = False,
        accept_licences: bool = False,
        probe: str | None = None,
        publish: str | None = None,
        progress: Progress | None = None,
        pins: tuple[str | None, ...] | None = None,
    ) -> CompositionInfo:
        if publish is not None:
            with session_scope(self.engine, writes=True) as session:
                require_publication(session, publish, recipe.export.value)
        result = self._compositions.compose(recipe, out, replace, progress, pins, accept_licences, probe)
        if publish is None:
            return result
        return result.model_copy(update={"published": published_name(self.publish_composed(Path(result.out), publish))})

    def publish_composed(
        self, folder: Path, name: str, *, progress: Progress | None = None
    ) -> BaseInfo | PublishResult:
        """Make the composition in `folder` a base, or an adapter, of that name."""
        return self._composed.publish(folder, name, progress)

    def submit_publication(self, job_id: str, name: str) -> JobInfo:
        return self._jobs.submit_publication(job_id, name)

    def submit(self, recipe: Recipe, *, accept_licences: bool = False, probe: str | None = None) -> JobInfo:
        return self._jobs.submit(recipe, accept_licences=accept_licences, probe=probe)

    def list_jobs(
        self, *, state: JobState | None = None, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[JobInfo]:
        return self._jobs.list(limit, cursor, state)

    def get_job(self, job_id: str) -> JobInfo:
        return self._jobs.get(job_id)

    def cancel_job(self, job_id: str) -> JobInfo:
        return self._jobs.cancel(job_id)

    def retry_job(self, job_id: str) -> JobInfo:
        return self._jobs.retry(job_id)

    def extract(
        self,
        finetune: str,
        base: str,
        out: Path,
        *,
        rank: int | None = None,
        energy: float | None = None,
        ignore_rest: bool = False,
        progress: Progress | None = None,
    ) -> ConversionInfo:
        return self._conversions.extract(finetune, base, out, rank, energy, ignore_rest, progress)

    def resize(self, ref: str, out: Path, *, rank: int | None = None, energy: float | None = None) -> ConversionInfo:
        return self._conversions.resize(ref, out, rank, energy)

    def make_delta(self, finetune: str, base: str, out: Path, *, progress: Progress | None = None) -> DeltaInfo:
        return self._conversions.make_delta(finetune, base, out, progress)

    def restore_delta(self, ref: str, base: str, out: Path, *, progress: Progress | None = None) -> DeltaInfo:
        return self._conversions.restore_delta(ref, base, out, progress)

    def set_private(self, name: str, private: bool) -> VersionInfo:
        return self._catalogue.set_private(name, private)

    def create_token(
        self,
        name: str,
        *,
        subject: str,
        scopes: tuple[Scope, ...],
        namespaces: tuple[str, ...] | None = None,
        days: int = DEFAULT_DAYS,
    ) -> NewToken:
        return self.tokens.create(name, subject, scopes, namespaces, days)

    def list_tokens(self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[TokenInfo]:
        return self.tokens.list(limit, cursor)

    def revoke_token(self, token_id: str) -> TokenInfo:
        return self.tokens.revoke(token_id)

    def list_namespaces(self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[NamespaceInfo]:
        return self._namespaces.list(limit, cursor)

    def grant(self, namespace: str, subject: str, role: Role) -> NamespaceInfo:
        return self._namespaces.grant(namespace, subject, role)

    def revoke(self, namespace: str, subject: str) -> NamespaceInfo:
        return self._namespaces.revoke(namespace, subject)

    def audit(
        self,
        *,
        subject: str | None = None,
        target: str | None = None,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
    ) -> Page[AuditEntry]:
        return self._audit.list(limit, cursor, subject=subject, target=target)

    def note_denied(self, target: str, code: str) -> None:
        """Write into the audit log that somebody known was refused."""
        self._audit.denied(target, code)

    def inspect(self, ref: str) -> dict[str, Any]:
        return self._inspection.inspect(ref)

    def doctor(self) -> tuple[DoctorCheck, ...]:
        return diagnose(self.engine, self.layout)

    def verify_store(self, *, repair: bool = False, progress: Progress | None = None) -> StoreCheck:
        return check_store(self, repair=repair, progress=progress)

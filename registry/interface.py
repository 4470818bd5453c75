"""What a registry can do, said once: the local one (services over a database) and the remote one (REST) both do it.

The CLI talks to this protocol only, so that every command works with ``--url`` as it does without.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from composer.recipe import Recipe
from registry.access import Role, Scope
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
    Relation,
    SignatureInfo,
    SignedBundle,
    StoreCheck,
    TokenInfo,
    Verdict,
    VersionInfo,
)

__all__ = ["DEFAULT_DAYS", "DEFAULT_MAX_BYTES", "DEFAULT_PAGE", "GRACE_DAYS", "KEEP_JOBS_DAYS", "Progress", "Registry"]

DEFAULT_PAGE = 100
DEFAULT_DAYS = 90
DEFAULT_MAX_BYTES = 64 << 30
GRACE_DAYS = 7.0
KEEP_JOBS_DAYS = 30.0
Progress = Callable[[str, int, int], None]
"""Called with (step, bytes done, bytes in all; 0 where unknown)."""


class Registry(Protocol):
    """Every method raises TypedErrors of composer.errors, and nothing else that a caller should expect."""

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
        """Fingerprint a checkpoint folder and register it; `name` defaults to the folder's. A repeat is a no-op."""
        ...

    def list_bases(self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[BaseInfo]:
        """Registered bases by name."""
        ...

    def get_base(self, ref: str) -> BaseInfo:
        """One base by name or fingerprint (``wf1:…``)."""
        ...

    def verify_base(self, ref: str, *, progress: Progress | None = None) -> BaseCheck:
        """Hash every tensor of a registered base again."""
        ...

    def remove_base(self, ref: str) -> None:
        """Forget a base that no adapter, descendant or recorded composition needs."""
        ...

    def yank(self, ref: str, reason: str | None) -> VersionInfo:
        """Withdraw a version, for a reason; None publishes it again. Its digest goes on working."""
        ...

    def deprecate(self, ref: str, reason: str | None, *, successor: str | None = None) -> VersionInfo:
        """Warn all who use a version, and name its successor; None takes that back."""
        ...

    def quarantine(self, ref: str, reason: str | None) -> tuple[VersionInfo, ...]:
        """Block the bytes of a version, whatever names them; None lifts that. Returns all versions of these bytes."""
        ...

    def delete_version(self, ref: str) -> None:
        """Remove a version that nothing depends on; its name is never given again."""
        ...

    def collect(
        self,
        *,
        grace_days: float = GRACE_DAYS,
        keep_jobs_days: float = KEEP_JOBS_DAYS,
        keep_records_days: float | None = None,
        dry_run: bool = False,
    ) -> Collected:
        """Remove what nothing names any more: stored files, uploads, outputs of old jobs."""
        ...

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
    ) -> PublishResult:
        """Publish an adapter folder. `base`: a registered name, a fingerprint, or (locally) a checkpoint folder.

        private: whether a new adapter is seen by the members of its namespace only. allow_nonfinite: NaN and infinities
        in its weights are a warning and no error; compose still refuses them.
        """
        ...

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
    ) -> ImportInfo:
        """Fetch ``hf://org/name[@revision]`` from a hub and publish the adapter or register the base that it is.

        `allow_private`: the hub may be at a private address. `max_bytes`: of all files.
        """
        ...

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
        """Queue an import; one that breaks off goes on where it ended when it is taken up again."""
        ...

    def list_adapters(
        self,
        *,
        namespace: str | None = None,
        kind: str | None = None,
        base: str | None = None,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
    ) -> Page[VersionInfo]:
        """The latest version of each adapter, by name."""
        ...

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
        """Latest versions with these properties, newest first.

        text: words with which words of name, description, tags, base or target modules begin; all must be there.
        """
        ...

    def lineage(self, base: str) -> LineageInfo:
        """Ancestors and descendants of a base, and bases that its weights suggest."""
        ...

    def get_version(self, ref: str) -> VersionInfo:
        """One version by ``name``, ``name@1.0.0``, ``name@alias`` or ``name@sha256:…``."""
        ...

    def list_versions(self, name: str, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[VersionInfo]:
        """All versions of an adapter, the highest first."""
        ...

    def set_alias(self, ref: str, alias: str) -> VersionInfo:
        """Point `alias` at the version that `ref` names."""
        ...

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias."""
        ...

    def pull(self, ref: str, out: Path, *, progress: Progress | None = None) -> VersionInfo:
        """Write a version's files into the new folder `out`, each checked against its digest, with its signatures."""
        ...

    def signatures(self, ref: str) -> tuple[SignedBundle, ...]:
        """The signatures of a version, each with its bundle, the first that came first."""
        ...

    def add_signature(self, ref: str, bundle: dict[str, Any]) -> SignatureInfo:
        """Keep a signature that lists exactly the files of a version (registry.verification makes it)."""
        ...

    def compatible(
        self, base: str, *, level: Level = Level.SHAPE, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[CompatibleAdapter]:
        """Latest versions that fit `base` at `level` or better, best first, then the newest."""
        ...

    def bases_for(
        self, ref: str, *, level: Level = Level.SHAPE, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[BaseFit]:
        """Registered bases that an adapter fits at `level` or better, best first, then by name."""
        ...

    def check(self, adapter: str, base: str) -> Verdict:
        """The verdict for one pair."""
        ...

    def plan(self, recipe: Recipe) -> PlanInfo:
        """What `compose` would do; writes nothing."""
        ...

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
        """Compose into the new folder `out`. `accept_licences`: even where they conflict.

        probe: a text, whose perplexity before and after goes into the record. publish: the name of the base, or of the
        adapter (export peft), that the result becomes. pins: the version or digest that each adapter of the recipe
        means, whatever its name means by now.
        """
        ...

    def submit(self, recipe: Recipe, *, accept_licences: bool = False, probe: str | None = None) -> JobInfo:
        """Queue a compose; the very same recipe over the same inputs is the job that there is already."""
        ...

    def submit_publication(self, job_id: str, name: str) -> JobInfo:
        """Queue that what a compose made becomes the base `name`, or the adapter (export peft)."""
        ...

    def list_jobs(
        self, *, state: JobState | None = None, limit: int = DEFAULT_PAGE, cursor: str | None = None
    ) -> Page[JobInfo]:
        """Jobs, newest first."""
        ...

    def get_job(self, job_id: str) -> JobInfo:
        """One job."""
        ...

    def cancel_job(self, job_id: str) -> JobInfo:
        """Stop a job that waits or runs."""
        ...

    def retry_job(self, job_id: str) -> JobInfo:
        """Queue a failed or cancelled job again."""
        ...

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
        """Write the new folder `out`: a LoRA of what `finetune` changed in `base`, at a rank or a share of the energy.

        Both are registered bases or folders; `ignore_rest` leaves out what is no linear weight.
        """
        ...

    def resize(self, ref: str, out: Path, *, rank: int | None = None, energy: float | None = None) -> ConversionInfo:
        """Write the new folder `out`: an adapter (name or folder) at another rank or a share of the energy."""
        ...

    def make_delta(self, finetune: str, base: str, out: Path, *, progress: Progress | None = None) -> DeltaInfo:
        """Write the new folder `out`: an adapter that is the exact difference of two bases or checkpoint folders."""
        ...

    def restore_delta(self, ref: str, base: str, out: Path, *, progress: Progress | None = None) -> DeltaInfo:
        """Write the new folder `out`: the checkpoint that such an adapter (name or folder) was made of, every byte."""
        ...

    def set_private(self, name: str, private: bool) -> VersionInfo:
        """Hide an adapter from all but the members of its namespace, or show it to everybody."""
        ...

    def create_token(
        self,
        name: str,
        *,
        subject: str,
        scopes: tuple[Scope, ...],
        namespaces: tuple[str, ...] | None = None,
        days: int = DEFAULT_DAYS,
    ) -> NewToken:
        """A new API token; its secret is shown this once. `namespaces`: the only ones it is good for."""
        ...

    def list_tokens(self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[TokenInfo]:
        """All tokens, without their secrets."""
        ...

    def revoke_token(self, token_id: str) -> TokenInfo:
        """End a token."""
        ...

    def list_namespaces(self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[NamespaceInfo]:
        """Namespaces that have members, of which the caller is one or an admin."""
        ...

    def grant(self, namespace: str, subject: str, role: Role) -> NamespaceInfo:
        """Make a subject a member of a namespace, or change its role."""
        ...

    def revoke(self, namespace: str, subject: str) -> NamespaceInfo:
        """Take a subject out of a namespace."""
        ...

    def audit(
        self,
        *,
        subject: str | None = None,
        target: str | None = None,
        limit: int = DEFAULT_PAGE,
        cursor: str | None = None,
    ) -> Page[AuditEntry]:
        """Who changed what, newest first."""
        ...

    def inspect(self, ref: str) -> dict[str, Any]:
        """What an adapter (name or folder), a base or a composed model (folder) holds, tensor by tensor."""
        ...

    def doctor(self) -> tuple[DoctorCheck, ...]:
        """Is everything in place?"""
        ...

    def verify_store(self, *, repair: bool = False, progress: Progress | None = None) -> StoreCheck:
        """Hash everything that is stored; with `repair`, restore what is damaged where a copy is left."""
        ...

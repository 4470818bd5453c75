"""What a registry can do, said once: the local one (services over a database) and the remote one (REST) both do it.

The CLI talks to this protocol only, so that every command works with ``--url`` as it does without.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from composer.recipe import Recipe
from registry.schemas import (
    BaseFit,
    BaseInfo,
    CompatibleAdapter,
    CompositionInfo,
    ConversionInfo,
    DeltaInfo,
    DoctorCheck,
    Level,
    Page,
    PlanInfo,
    PublishResult,
    Relation,
    Verdict,
    VersionInfo,
)

__all__ = ["DEFAULT_PAGE", "Progress", "Registry"]

DEFAULT_PAGE = 100
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
        progress: Progress | None = None,
    ) -> PublishResult:
        """Publish an adapter folder. `base`: a registered name, a fingerprint, or (locally) a checkpoint folder."""
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

    def search(self, text: str, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[VersionInfo]:
        """Adapters whose name, description, tags, base or target modules hold every word of `text`."""
        ...

    def get_version(self, ref: str) -> VersionInfo:
        """One version by ``name``, ``name@1.0.0``, ``name@alias`` or ``name@sha256:…``."""
        ...

    def list_versions(self, name: str) -> tuple[VersionInfo, ...]:
        """All versions of an adapter, newest first."""
        ...

    def set_alias(self, ref: str, alias: str) -> VersionInfo:
        """Point `alias` at the version that `ref` names."""
        ...

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias."""
        ...

    def pull(self, ref: str, out: Path, *, progress: Progress | None = None) -> VersionInfo:
        """Write a version's files into the new folder `out`, each checked against its digest."""
        ...

    def compatible(self, base: str, *, level: Level = Level.SHAPE) -> tuple[CompatibleAdapter, ...]:
        """Latest versions that fit `base` at `level` or better, best first."""
        ...

    def bases_for(self, ref: str, *, level: Level = Level.SHAPE) -> tuple[BaseFit, ...]:
        """Registered bases that an adapter fits at `level` or better, best first."""
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
        probe: str | None = None,
        progress: Progress | None = None,
    ) -> CompositionInfo:
        """Compose into the new folder `out`.

        probe: a text, whose perplexity before and after goes into the record.
        """
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

    def inspect(self, ref: str) -> dict[str, Any]:
        """What an adapter (name or folder), a base or a composed model (folder) holds, tensor by tensor."""
        ...

    def doctor(self) -> tuple[DoctorCheck, ...]:
        """Is everything in place?"""
        ...

"""The registry on this machine: all services behind one object.

open_registry()  ->  LocalRegistry (registry.interface.Registry)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from composer.recipe import Recipe, split_reference
from composer.sinks import storage_errors
from registry.db import create_database_engine, migrate
from registry.interface import DEFAULT_PAGE, Progress
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
from registry.services.catalogue import Catalogue
from registry.services.compositions import Compositions
from registry.services.conversions import Conversions
from registry.services.diagnosis import diagnose
from registry.services.inspection import Inspection
from registry.services.publishing import Publishing
from registry.store.layout import Layout, default_home
from registry.store.local import LocalStore
from registry.store.pulling import pull_files

__all__ = ["LocalRegistry", "open_registry"]


def open_registry(home: Path | None = None, database_url: str | None = None) -> LocalRegistry:
    """The registry under `home` (default REGISTRY_HOME), made and migrated as needed."""
    layout = Layout((home or default_home()).expanduser().resolve())
    with storage_errors(f"opening {layout.home}"):
        layout.home.mkdir(parents=True, exist_ok=True)
    return LocalRegistry(layout, database_url or os.environ.get("REGISTRY_DATABASE_URL") or layout.database_url)


class LocalRegistry:
    """Services over one database and one store."""

    def __init__(self, layout: Layout, database_url: str) -> None:
        self.layout = layout
        self.engine = create_database_engine(database_url)
        migrate(self.engine)
        self.store = LocalStore(layout)
        self._catalogue = Catalogue(self.engine)
        self._publishing = Publishing(self.engine, self.store)
        self._compositions = Compositions(self.engine, self.store, layout)
        self._conversions = Conversions(self.engine, self.store, self._compositions)
        self._inspection = Inspection(self.engine, self.store)

    @property
    def home(self) -> Path:
        """The folder of everything that is not in the database."""
        return self.layout.home

    def close(self) -> None:
        """Release the database."""
        self.engine.dispose()

    def add_base(
        self,
        folder: Path,
        *,
        name: str | None = None,
        parent: str | None = None,
        relation: Relation | None = None,
        progress: Progress | None = None,
    ) -> BaseInfo:
        return self._publishing.add_base(folder, name, parent, relation, progress)

    def list_bases(self, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[BaseInfo]:
        return self._catalogue.list_bases(limit, cursor)

    def get_base(self, ref: str) -> BaseInfo:
        return self._catalogue.get_base(ref)

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
        read_paths: bool = True,
    ) -> PublishResult:
        """As the protocol says; `read_paths=False` for uploads: paths in them are not looked up on this machine."""
        return self._publishing.publish(
            folder, name, version, base, license, tags, description, progress, read_paths=read_paths
        )

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

    def search(self, text: str, *, limit: int = DEFAULT_PAGE, cursor: str | None = None) -> Page[VersionInfo]:
        return self._catalogue.list_adapters(limit, cursor, words=tuple(text.split()))

    def get_version(self, ref: str) -> VersionInfo:
        return self._catalogue.get_version(*split_reference(ref))

    def list_versions(self, name: str) -> tuple[VersionInfo, ...]:
        return self._catalogue.list_versions(name)

    def set_alias(self, ref: str, alias: str) -> VersionInfo:
        return self._catalogue.set_alias(*split_reference(ref), alias)

    def delete_alias(self, name: str, alias: str) -> None:
        self._catalogue.delete_alias(name, alias)

    def version_files(self, ref: str) -> dict[str, Path]:
        """The files of a version: name to blob, each present."""
        return {file.name: self.store.path(file.sha256) for file in self.get_version(ref).files}

    def pull(self, ref: str, out: Path, *, progress: Progress | None = None) -> VersionInfo:
        info = self.get_version(ref)
        pull_files(self.store, info.files, out, progress)
        return info

    def compatible(self, base: str, *, level: Level = Level.SHAPE) -> tuple[CompatibleAdapter, ...]:
        return self._catalogue.compatible(base, level)

    def bases_for(self, ref: str, *, level: Level = Level.SHAPE) -> tuple[BaseFit, ...]:
        return self._catalogue.bases_for(*split_reference(ref), level)

    def check(self, adapter: str, base: str) -> Verdict:
        return self._compositions.check(adapter, base)

    def plan(self, recipe: Recipe) -> PlanInfo:
        return self._compositions.plan(recipe)

    def compose(
        self,
        recipe: Recipe,
        out: Path,
        *,
        replace: bool = False,
        probe: str | None = None,
        progress: Progress | None = None,
    ) -> CompositionInfo:
        return self._compositions.compose(recipe, out, replace, progress, probe)

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

    def inspect(self, ref: str) -> dict[str, Any]:
        return self._inspection.inspect(ref)

    def doctor(self) -> tuple[DoctorCheck, ...]:
        return diagnose(self.engine, self.layout)

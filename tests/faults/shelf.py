"""A registry whose content is checked against what was given to it, bypassing the services that are under test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from registry.db import session_scope
from registry.models import AdapterRow, CommitFileRow, VersionFileRow, VersionRow
from registry.services.local import LocalRegistry, open_registry
from tests.support import write_base, write_lora

__all__ = ["MODULES", "Shelf", "files_of", "make_adapter", "make_base", "sha256"]

MODULES = tuple(f"model.layers.{index}.self_attn.q_proj" for index in range(4))
SIZE = 256
CARD = "---\nlicense: mit\ntags: [{0}]\n---\n\nNumber {0}.\n"


def make_base(folder: Path, size: int = SIZE, layers: int = 4) -> Path:
    """A checkpoint of `layers` square matrices."""
    rng = np.random.default_rng(0)
    names = [f"model.layers.{index}.self_attn.q_proj.weight" for index in range(layers)]
    return write_base(folder, {name: rng.standard_normal((size, size), np.float32) for name in names})


def make_adapter(folder: Path, seed: int, rank: int = 16, size: int = SIZE) -> Path:
    """A LoRA on it, with a card; other bytes for each seed."""
    write_lora(folder, dict.fromkeys(MODULES, (size, size)), rank=rank, seed=seed, base_model_name_or_path="base")
    (folder / "README.md").write_text(CARD.format(seed))
    return folder


def sha256(path: Path) -> str:
    """Of a file, without the code under test."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(folder: Path) -> dict[str, str]:
    """Its files by name: their digests."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


class Shelf:
    """A registry under `home` with the base `base`, and what each of its versions must hold."""

    def __init__(self, home: Path, database_url: str | None = None) -> None:
        self.home = home
        self.registry: LocalRegistry = open_registry(home, database_url)
        self.registry.add_base(make_base(home.parent / f"{home.name}-base"), name="base")
        self.wanted: dict[str, Mapping[str, str]] = {}
        self._whole: set[tuple[str, str, str]] = set()

    @property
    def database_url(self) -> str:
        """Where its catalogue lies."""
        return self.registry.engine.url.render_as_string(hide_password=False)

    def visible(self) -> dict[str, dict[str, str]]:
        """Every version in the catalogue: `name@version` to its files' names and digests."""
        query = sa.select(
            AdapterRow.namespace, AdapterRow.name, VersionRow.version, VersionFileRow.name, VersionFileRow.sha256
        )
        query = query.select_from(AdapterRow).join(VersionRow, VersionRow.adapter_id == AdapterRow.id)
        found: dict[str, dict[str, str]] = {}
        with session_scope(self.registry.engine) as session:
            for namespace, name, version, file, digest in session.execute(
                query.outerjoin(VersionFileRow, VersionFileRow.version_id == VersionRow.id)
            ):
                files = found.setdefault(f"{namespace}/{name}@{version}", {})
                if file is not None:
                    files[file] = digest
        return found

    def lost(self, acknowledged: Iterable[str]) -> list[str]:
        """Which of those are not in the catalogue, or not readable through the service."""
        visible = self.visible()
        gone = [ref for ref in acknowledged if ref not in visible]
        return [f"{ref} was acknowledged and is gone" for ref in gone]

    def partial(self, *, again: bool = False) -> list[str]:
        """What is visible and not whole: other files than were given, or other bytes. Each is read once, or `again`."""
        if again:
            self._whole.clear()
        problems = []
        for ref, files in self.visible().items():
            if (wanted := self.wanted.get(ref)) is not None and files != wanted:
                problems.append(f"{ref} holds {sorted(files)}, not {sorted(wanted)}")
            for name, digest in files.items():
                if (ref, name, digest) in self._whole:
                    continue
                place = self.registry.layout.blob(digest)
                if not place.is_file() or sha256(place) != digest:
                    problems.append(f"{ref}: the bytes of {name} are {'wrong' if place.is_file() else 'missing'}")
                else:
                    self._whole.add((ref, name, digest))
        return problems

    def left(self) -> list[str]:
        """What is still there, after a collection without grace, that nothing names; and whether the database is sound."""
        self.registry.collect(grace_days=0, keep_jobs_days=0)
        with session_scope(self.registry.engine) as session:
            named = set(session.scalars(sa.select(VersionFileRow.sha256)))
            named |= set(session.scalars(sa.select(CommitFileRow.sha256)))
            sound = self.registry.engine.dialect.name != "sqlite" or (
                session.connection().exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
            )
        layout = self.registry.layout
        blobs = {path.name for path in layout.blobs.glob("??/*")}
        return [
            *(f"the blob {digest} is named by nothing" for digest in sorted(blobs - named)),
            *(f"the blob {digest} is missing" for digest in sorted(named - blobs)),
            *(f"{path} is half-written" for path in layout.incoming.glob("*")),
            *(f"{path} is no output of a job" for path in layout.compositions.glob("*")),
            *([] if sound else ["the database is damaged"]),
        ]

    def close(self) -> None:
        """Release the database."""
        self.registry.close()

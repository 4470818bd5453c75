"""What was composed becomes a repository: a base that every client loads by its name, or an adapter.

    folder of a composition -> links under uploads/ -> fingerprinted and registered, its base as its parent (merged)
    folder of --export peft -> published as any adapter

The base remembers the adapters that are merged into it: quarantining one of them blocks it too.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from composer.errors import NotFoundError, PolicyError
from composer.files import read_json, sha256_file
from registry.access import Role, Scope
from registry.db import session_scope
from registry.interface import Progress
from registry.models import AdapterRow, BaseModelRow, VersionRow
from registry.names import base_name
from registry.schemas import BaseInfo, PublishResult, Relation
from registry.services.audit import acting
from registry.services.base_files import link_files
from registry.services.catalogue import base_info, tensor_count
from registry.services.lifecycle import refuse_quarantined
from registry.services.namespaces import require_role
from registry.services.publishing import Publishing
from registry.store.layout import Layout

__all__ = ["Composed", "published_name", "require_publication"]

RECORD = "composition.json"
PEFT = "peft"


def require_publication(session: Session, name: str, export: str) -> None:
    """Raise ForbiddenError or UsageError unless the caller may publish a composition under `name`."""
    if export != PEFT:
        acting(session).require_everywhere(Scope.PUBLISH)
    namespace, slash, _ = base_name(name).rpartition("/")
    if slash:
        require_role(session, namespace, Role.PUBLISHER, claim=True)


def published_name(noun: BaseInfo | PublishResult) -> str:
    """What a composition was published as: a base's name, or an adapter's with its version."""
    return noun.name if isinstance(noun, BaseInfo) else f"{noun.version.name}@{noun.version.version}"


class Composed:
    """Publishes folders that compose wrote."""

    def __init__(self, engine: Engine, layout: Layout, publishing: Publishing) -> None:
        self._engine = engine
        self._layout = layout
        self._publishing = publishing

    def publish(self, folder: Path, name: str, progress: Progress | None) -> BaseInfo | PublishResult:
        """Register the model in `folder` as the base `name`, or publish the LoRA in it as the adapter `name`.

        Raises NotFoundError where no composition lies there, PolicyError for one with private adapters in it,
        QuarantinedError, and what add_base and publish raise.
        """
        if not (folder / RECORD).is_file():
            raise NotFoundError(
                f"{folder} is no composed model", expected=RECORD, found="no record", remedy="compose it first"
            )
        record = read_json(folder / RECORD)
        digests = sorted({str(item["digest"]) for item in record["adapters"]})
        exported = record["recipe"]["export"]
        with session_scope(self._engine, writes=True) as session:
            require_publication(session, name, exported)
            for digest in digests:
                refuse_quarantined(session, digest, name)
            hidden = [digest for digest in digests if _private(session, digest)]
            parent = session.scalar(
                select(BaseModelRow.name).where(BaseModelRow.fingerprint == record["base"]["fingerprint"])
            )
        if exported == PEFT:
            files = {path.name: path for path in folder.iterdir() if path.is_file()}
            private = True if hidden else None
            return self._publishing.publish(files, name, None, None, None, (), None, private, progress)
        if hidden:
            raise PolicyError(
                f"{name} would show everybody what private adapters hold: bases are public",
                expected="adapters that everybody may see",
                found=hidden,
                remedy="show them first ('registry visibility'), or export one LoRA with --export peft",
            )
        return self._register(folder, name, record, parent, digests, progress)

    def _register(
        self,
        folder: Path,
        name: str,
        record: dict[str, Any],
        parent: str | None,
        digests: list[str],
        progress: Progress | None,
    ) -> BaseInfo:
        wanted = {file: str(entry["sha256"]) for file, entry in record["outputs"].items()}
        wanted[RECORD] = sha256_file(folder / RECORD)
        with session_scope(self._engine) as session:
            row = session.scalar(select(BaseModelRow).where(BaseModelRow.name == name))
            if row is not None and {file.name: file.sha256 for file in row.files} == wanted:
                return base_info(row, tensor_count(session, row))  # it is that base already
        kept = link_files(self._layout, {file: folder / file for file in (*record["outputs"], RECORD)})
        relation = Relation.MERGED if parent else None
        try:
            base = self._publishing.add_base(kept, name, parent, relation, None, progress, made_of=digests)
        except BaseException:
            shutil.rmtree(kept.parent, ignore_errors=True)
            raise
        if Path(base.location) != kept:
            shutil.rmtree(kept.parent, ignore_errors=True)
        return base


def _private(session: Session, digest: str) -> bool:
    """Whether these bytes are here under private names only, asked of names that the caller sees not too."""
    versions, adapters = VersionRow.__table__, AdapterRow.__table__
    query = select(adapters.c.private).join(versions, versions.c.adapter_id == adapters.c.id)
    found = set(session.execute(query.where(versions.c.digest == digest)).scalars())
    return found == {True}

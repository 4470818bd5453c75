"""Repositories are created, renamed and deleted; branches and tags come and go.

tag on an adapter   1.2.0 or v1.2.0 publishes the commit under that version; any other name is an alias
tag on a base       a tag
branch              a place for drafts; what is tagged there becomes a version
"""

from __future__ import annotations

from sqlalchemy import Engine, delete, exists, select
from sqlalchemy.orm import Session

from composer.errors import ConflictError, PolicyError
from registry.access import Role
from registry.db import session_scope
from registry.errors import RefExistsError, RepositoryExistsError, RepositoryNotFoundError
from registry.models import (
    AdapterRow,
    AliasRow,
    BaseModelRow,
    CompositionInputRow,
    RefRow,
    RepositoryRow,
    TombstoneRow,
    VersionRow,
)
from registry.names import Version, adapter_name, alias_name
from registry.services.audit import record
from registry.services.catalogue import Catalogue
from registry.services.namespaces import require_role
from registry.services.pushing import Pushing, keep_commit, namespace_of, own_repository, private_base, set_ref
from registry.services.repositories import MAIN, Located, locate, no_revision, snapshot_at
from registry.words import index_text

__all__ = ["RepositoryAdmin"]


class RepositoryAdmin:
    """Everything about repositories but their files."""

    def __init__(self, engine: Engine, catalogue: Catalogue, pushing: Pushing) -> None:
        self._engine = engine
        self._catalogue = catalogue
        self._pushing = pushing

    def create(self, name: str, *, private: bool = False) -> str:
        """An empty repository; returns its full name. Raises UsageError or RepositoryExistsError.

        private: only members of its namespace see it and what is pushed to it.
        """
        namespace, short = adapter_name(name)
        full = f"{namespace}/{short}"
        with session_scope(self._engine, writes=True) as session:
            require_role(session, namespace, Role.PUBLISHER, claim=True)
            self._check_free(session, full)
            session.add(RepositoryRow(namespace=namespace, name=short, private=private))
        return full

    def set_private(self, name: str, private: bool) -> None:
        """Hide a repository from all but the members of its namespace, or show it. For owners.

        Raises PolicyError for a base, which everybody sees.
        """
        with session_scope(self._engine, writes=True) as session:
            place = locate(session, name)
            require_role(session, namespace_of(place), Role.OWNER)
            if place.base is not None and private:
                raise private_base(place.name)
            if place.repository is not None:
                place.repository.private = private
            if place.adapter is not None:
                place.adapter.private = private
            record(session, "visibility", place.name, private=private)

    def delete(self, name: str) -> None:
        """Remove a repository and what it published.

        Raises ConflictError when a composition, an adapter or another base needs it.
        """
        with session_scope(self._engine, writes=True) as session:
            place = locate(session, name)
            require_role(session, namespace_of(place), Role.OWNER)
            if users := _users(session, place):
                raise ConflictError(
                    f"{place.name} is in use: {users[0]}",
                    expected="nothing that needs it",
                    found=users,
                    remedy="remove what needs it first",
                )
            if place.repository:
                session.delete(place.repository)
                session.flush()
            if place.adapter:
                session.execute(delete(AliasRow).where(AliasRow.adapter_id == place.adapter.id))
                for row in session.scalars(select(VersionRow).where(VersionRow.adapter_id == place.adapter.id)):
                    session.merge(
                        TombstoneRow(
                            namespace=place.adapter.namespace,
                            name=place.adapter.name,
                            version=row.version,
                            digest=row.digest,
                        )
                    )
                    session.delete(row)
                session.flush()
                session.delete(place.adapter)
            if place.base:
                session.delete(place.base)

    def move(self, name: str, to: str) -> None:
        """Rename a repository with all that it published. Raises RepositoryExistsError."""
        namespace, short = adapter_name(to)
        with session_scope(self._engine, writes=True) as session:
            place = locate(session, name)
            require_role(session, namespace_of(place), Role.OWNER)
            require_role(session, namespace, Role.PUBLISHER, claim=True)
            self._check_free(session, f"{namespace}/{short}")
            if place.repository:
                place.repository.namespace, place.repository.name = namespace, short
            if place.base:
                place.base.name = f"{namespace}/{short}"
            if place.adapter:
                former = place.adapter.full_name
                place.adapter.namespace, place.adapter.name = namespace, short
                for row in session.scalars(select(VersionRow).where(VersionRow.adapter_id == place.adapter.id)):
                    rest = row.search_text.removeprefix(index_text(former))
                    row.search_text = index_text(f"{namespace}/{short}") + rest

    @staticmethod
    def _check_free(session: Session, name: str) -> None:
        try:
            place = locate(session, name)
        except RepositoryNotFoundError:
            return
        kind = "a base" if place.base else "an adapter" if place.adapter else "a repository"
        raise RepositoryExistsError(
            f"{name} exists already: it is {kind}", expected="a free name", found=kind, remedy="choose another name"
        )

    def create_branch(self, name: str, branch: str, revision: str | None = None) -> None:
        """A branch at a revision, default main. Raises RefExistsError."""
        alias_name(branch)
        with session_scope(self._engine, writes=True) as session:
            place = locate(session, name)
            require_role(session, namespace_of(place), Role.PUBLISHER)
            self._check_ref(session, place, branch)
            self._set_ref(session, place, "branch", branch, revision)

    def delete_branch(self, name: str, branch: str) -> None:
        """Remove a branch; its commits stay. Raises RevisionNotFoundError, or PolicyError for main."""
        if branch == MAIN:
            raise PolicyError(
                "main cannot be deleted", expected="another branch", found=branch, remedy="delete the repository"
            )
        with session_scope(self._engine, writes=True) as session:
            place = locate(session, name)
            require_role(session, namespace_of(place), Role.PUBLISHER)
            self._delete_ref(session, place, "branch", branch)

    def create_tag(self, name: str, tag: str, revision: str | None = None) -> None:
        """A tag at a revision: a version or an alias where that is an adapter.

        Raises RefExistsError, or what publishing raises.
        """
        with session_scope(self._engine, writes=True) as session:
            place = locate(session, name)
            require_role(session, namespace_of(place), Role.PUBLISHER)
            snapshot = snapshot_at(session, place, revision)
            self._check_ref(session, place, tag)
            if snapshot.base is not None:
                alias_name(tag)
                self._set_ref(session, place, "tag", tag, revision)
                return
        version = tag.removeprefix("v") if Version.matches(tag.removeprefix("v")) else None
        if version is not None:
            self._pushing.publish_version(place.name, snapshot, version)
            if tag != version:
                self._catalogue.set_alias(place.name, version, tag)
            return
        alias_name(tag)
        if snapshot.version is None:
            raise PolicyError(
                f"{place.name} at {snapshot.commit[:12]} is a draft: an alias names what is published",
                expected="a commit on main that holds an adapter, or a tag such as 1.0.0",
                found=tag,
                remedy="tag it 1.0.0 (any semantic version) to publish it, or push it to main",
            )
        self._catalogue.set_alias(place.name, snapshot.version.version, tag)

    def delete_tag(self, name: str, tag: str) -> None:
        """Remove an alias or a base's tag. Raises PolicyError for a version: those stay."""
        with session_scope(self._engine, writes=True) as session:
            place = locate(session, name)
            require_role(session, namespace_of(place), Role.PUBLISHER)
            if place.adapter is None:
                self._delete_ref(session, place, "tag", tag)
                return
        if Version.matches(tag):
            raise PolicyError(
                f"{place.name}@{tag} is a version, and versions stay",
                expected="an alias",
                found=tag,
                remedy="publish a newer version",
            )
        self._catalogue.delete_alias(place.name, tag)

    @staticmethod
    def _check_ref(session: Session, place: Located, name: str) -> None:
        taken = name == MAIN
        if place.repository:
            refs = select(RefRow.name).where(RefRow.repository_id == place.repository.id, RefRow.name == name)
            taken = taken or session.scalar(refs) is not None
        if place.adapter:
            names = (name, name.removeprefix("v"))
            versions = exists().where(VersionRow.adapter_id == place.adapter.id, VersionRow.version.in_(names))
            aliases = exists().where(AliasRow.adapter_id == place.adapter.id, AliasRow.alias == name)
            taken = taken or bool(session.scalar(select(versions | aliases)))
        if taken:
            raise RefExistsError(
                f"{place.name} has a branch or a tag {name!r} already",
                expected="a free name",
                found=name,
                remedy="delete it first, or choose another name",
            )

    @staticmethod
    def _set_ref(session: Session, place: Located, kind: str, name: str, revision: str | None) -> None:
        snapshot = snapshot_at(session, place, revision)
        repository = own_repository(session, place)
        row = keep_commit(session, repository, snapshot.commit, snapshot.files, None, "registered")
        if snapshot.base and row.base_id is None:
            row.base_id = session.scalar(
                select(BaseModelRow.id).where(BaseModelRow.fingerprint == snapshot.base.fingerprint)
            )
        set_ref(session, repository, kind, name, row)

    @staticmethod
    def _delete_ref(session: Session, place: Located, kind: str, name: str) -> None:
        ref = session.get(RefRow, (place.repository.id, kind, name)) if place.repository else None
        if ref is None:
            raise no_revision(place, name)
        session.delete(ref)


def _users(session: Session, place: Located) -> list[str]:
    """What would lose its input if a repository were gone."""
    digests: list[str] = []
    found: list[str] = []
    if place.adapter:
        digests += session.scalars(select(VersionRow.digest).where(VersionRow.adapter_id == place.adapter.id))
    if place.base:
        digests.append(place.base.fingerprint)
        adapters = (
            select(AdapterRow)
            .join(VersionRow, VersionRow.adapter_id == AdapterRow.id)
            .where(VersionRow.base_fingerprint == place.base.fingerprint)
        )
        found += [f"the adapter {row.full_name}" for row in session.scalars(adapters.distinct().limit(5))]
        children = select(BaseModelRow.name).where(BaseModelRow.parent_id == place.base.id)
        found += [f"the base {child}" for child in session.scalars(children.limit(5))]
    used = select(CompositionInputRow.digest).where(CompositionInputRow.digest.in_(digests)).distinct()
    found += [f"a composition of {digest[:19]}…" for digest in session.scalars(used)]
    return found

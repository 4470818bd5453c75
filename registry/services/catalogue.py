"""Names, versions, aliases and bases: looking up, listing and pointing."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Engine, and_, func, select, tuple_
from sqlalchemy.orm import Session, selectinload

from composer.adapters import Target
from composer.places import with_module_places
from registry.compat import BaseClaim, BaseFacts, assess, better_or_equal
from registry.db import session_scope
from registry.errors import AdapterNotFoundError, BaseNotFoundError, VersionNotFoundError
from registry.models import AdapterRow, AliasRow, BaseModelRow, BaseTensorRow, VersionRow, now
from registry.names import adapter_name, alias_name
from registry.schemas import (
    BaseFit,
    BaseInfo,
    BaseStatus,
    CompatibleAdapter,
    FileInfo,
    Level,
    Page,
    Relation,
    Verdict,
    VersionInfo,
)

__all__ = ["Catalogue", "base_facts", "base_info", "find_base", "find_version", "version_info", "version_verdict"]

MAX_PAGE = 1000
MAX_LINEAGE = 100


def base_info(row: BaseModelRow, tensors: int, *, created: bool = False) -> BaseInfo:
    """A row as a schema."""
    return BaseInfo(
        name=row.name,
        fingerprint=row.fingerprint,
        tensor_root=row.tensor_root,
        value_root=row.value_root,
        layout_digest=row.layout_digest,
        config_digest=row.config_digest,
        tokenizer_digest=row.tokenizer_digest,
        chat_template_digest=row.chat_template_digest,
        architecture=row.architecture,
        dtype=row.dtype,
        parameters=row.parameters,
        tensors=tensors,
        nbytes=row.nbytes,
        location=row.location,
        parent=row.parent.name if row.parent else None,
        relation=Relation(row.relation) if row.relation else None,
        created_at=row.created_at,
        created=created,
    )


def version_info(session: Session, row: VersionRow) -> VersionInfo:
    """A row as a schema; the state of its base is looked up anew, so it follows what is registered."""
    base = None
    if row.base_fingerprint:
        base = session.scalar(select(BaseModelRow.name).where(BaseModelRow.fingerprint == row.base_fingerprint))
    aliases = list(
        session.scalars(select(AliasRow.alias).where(AliasRow.version_id == row.id).order_by(AliasRow.alias))
    )
    latest = session.scalar(
        select(VersionRow.id).where(VersionRow.adapter_id == row.adapter_id).order_by(*LATEST).limit(1)
    )
    return VersionInfo(
        name=row.adapter.full_name,
        version=row.version,
        digest=row.digest,
        kind=row.kind,
        rank=row.rank,
        alpha=row.alpha,
        target_modules=tuple(row.target_modules),
        parameters=row.parameters,
        nbytes=row.nbytes,
        base_status=_status(row.base_fingerprint, base),
        base_fingerprint=row.base_fingerprint,
        base_name=row.base_name,
        base=base,
        license=row.license,
        tags=tuple(row.tags),
        description=row.description,
        aliases=("latest", *aliases) if latest == row.id else tuple(aliases),
        files=tuple(FileInfo(name=file.name, size=file.size, sha256=file.sha256) for file in row.files),
        created_at=row.created_at,
    )


def _status(fingerprint: str | None, base: str | None) -> BaseStatus:
    if fingerprint is None:
        return BaseStatus.UNVERIFIED
    return BaseStatus.VERIFIED if base else BaseStatus.PENDING


# The highest release; a pre-release only where there is nothing else.
LATEST = (VersionRow.prerelease, VersionRow.sort_key.desc())


def find_base(session: Session, ref: str) -> BaseModelRow:
    """A base by name or fingerprint. Raises BaseNotFoundError."""
    column = BaseModelRow.fingerprint if ref.startswith("wf1:") else BaseModelRow.name
    row = session.scalar(select(BaseModelRow).where(column == ref))
    if row is None:
        known = list(session.scalars(select(BaseModelRow.name).order_by(BaseModelRow.name).limit(10)))
        raise BaseNotFoundError(
            f"no base is registered as {ref!r}",
            expected=known or "a registered base",
            found=ref,
            remedy="register it with 'registry base add PATH --name NAME', or give a folder as ./PATH",
        )
    return row


def find_version(session: Session, ref: str, version: str | None) -> VersionRow:
    """A version of `ref` by semantic version, alias, digest (or a prefix of it) or, with None, the latest.

    Raises AdapterNotFoundError or VersionNotFoundError with what there is.
    """
    namespace, name = adapter_name(ref)
    adapter = session.scalar(select(AdapterRow).where(AdapterRow.namespace == namespace, AdapterRow.name == name))
    if adapter is None:
        near = session.execute(
            select(AdapterRow.namespace, AdapterRow.name)
            .where((AdapterRow.name == name) | (AdapterRow.namespace == namespace))
            .limit(5)
        )
        listed = [f"{row.namespace}/{row.name}" for row in near]
        raise AdapterNotFoundError(
            f"no adapter is named {namespace}/{name}",
            expected=listed or "a published adapter",
            found=f"{namespace}/{name}",
            remedy=f"did you mean {' or '.join(listed)}?"
            if listed
            else "see 'registry list', or give a folder as ./PATH",
        )
    query = select(VersionRow).where(VersionRow.adapter_id == adapter.id)
    if version is None or version == "latest":
        row = session.scalar(query.order_by(*LATEST).limit(1))
    elif version.startswith("sha256:"):
        rows = session.scalars(query.where(VersionRow.digest.startswith(version, autoescape=True)).order_by(*LATEST))
        found = list(rows)
        row = found[0] if len({item.digest for item in found}) == 1 else None
    else:
        alias = select(AliasRow.version_id).where(AliasRow.adapter_id == adapter.id, AliasRow.alias == version)
        row = session.scalar(query.where((VersionRow.version == version) | (VersionRow.id == alias.scalar_subquery())))
    if row is None:
        known = list(session.scalars(select(VersionRow.version).where(VersionRow.adapter_id == adapter.id).limit(20)))
        aliases = list(session.scalars(select(AliasRow.alias).where(AliasRow.adapter_id == adapter.id).limit(20)))
        raise VersionNotFoundError(
            f"{adapter.full_name} has no version {version!r}",
            expected=["latest", *aliases, *known],
            found=version,
            remedy=f"see 'registry versions {adapter.full_name}'",
        )
    return row


def base_facts(session: Session, row: BaseModelRow) -> BaseFacts:
    """All that a verdict needs of a base: its shapes and its declared relatives."""
    tensors = session.execute(select(BaseTensorRow.name, BaseTensorRow.shape).where(BaseTensorRow.base_id == row.id))
    return BaseFacts(
        name=row.name,
        fingerprint=row.fingerprint,
        value_root=row.value_root,
        config_digest=row.config_digest,
        shapes=with_module_places({name: tuple(shape) for name, shape in tensors}, row.architecture),
        relatives=_relatives(session, row),
    )


def _relatives(session: Session, row: BaseModelRow) -> dict[str, str]:
    """Ancestors and descendants of a base, by fingerprint, with a phrase; siblings are not relatives."""
    found: dict[str, str] = {}
    child, parent = row, row.parent
    while parent is not None and parent.fingerprint not in found and len(found) < MAX_LINEAGE:
        found[parent.fingerprint] = f"{child.name} is declared as {child.relation} from {parent.name}"
        child, parent = parent, session.get(BaseModelRow, parent.parent_id) if parent.parent_id else None
    generation: Sequence[int] = [row.id]
    while generation and len(found) < MAX_LINEAGE:
        children = session.scalars(select(BaseModelRow).where(BaseModelRow.parent_id.in_(generation)))
        fresh = [item for item in children if item.fingerprint not in found]
        for item in fresh:
            found[item.fingerprint] = f"{item.name} is declared as {item.relation} from {item.parent.name}"
        generation = [item.id for item in fresh]
    return found


def version_verdict(session: Session, version: VersionRow, facts: BaseFacts) -> Verdict:
    """The verdict for a published version on a base."""
    targets = tuple(Target(target.parameter, tuple(target.shape)) for target in version.targets)
    return assess(
        targets, version_claim(session, version), facts, differing_tensors(session, version, facts.fingerprint)
    )


def version_claim(session: Session, version: VersionRow) -> BaseClaim:
    """What a version says of its base, completed from the catalogue when that base is registered."""
    base = None
    if version.base_fingerprint and not version.base_value_root:
        base = session.scalar(select(BaseModelRow).where(BaseModelRow.fingerprint == version.base_fingerprint))
    return BaseClaim(
        fingerprint=version.base_fingerprint,
        value_root=base.value_root if base else version.base_value_root,
        config_digest=base.config_digest if base else version.base_config_digest,
        name=version.base_name,
    )


def differing_tensors(session: Session, version: VersionRow, fingerprint: str) -> tuple[str, ...] | None:
    """Names of the tensors in which the version's own base differs from another; None unless both are registered."""
    if version.base_fingerprint in (None, fingerprint):
        return None
    rows = [
        dict(session.execute(select(BaseTensorRow.name, BaseTensorRow.digest).join(BaseModelRow).where(
            BaseModelRow.fingerprint == wanted)).tuples().all())
        for wanted in (version.base_fingerprint, fingerprint)
    ]  # fmt: skip
    if not all(rows):
        return None
    return tuple(sorted(name for name in rows[0].keys() | rows[1].keys() if rows[0].get(name) != rows[1].get(name)))


class Catalogue:
    """Reads, and the two writes that only point: aliases."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def list_bases(self, limit: int, cursor: str | None) -> Page[BaseInfo]:
        """Bases by name; the cursor is the last name seen."""
        limit = max(1, min(limit, MAX_PAGE))
        with session_scope(self._engine) as session:
            query = select(BaseModelRow).order_by(BaseModelRow.name).limit(limit + 1)
            if cursor:
                query = query.where(BaseModelRow.name > cursor)
            rows = list(session.scalars(query))
            items = tuple(base_info(row, self._tensor_count(session, row)) for row in rows[:limit])
        return Page(items=items, next=rows[limit - 1].name if len(rows) > limit else None)

    def get_base(self, ref: str) -> BaseInfo:
        """One base."""
        with session_scope(self._engine) as session:
            row = find_base(session, ref)
            return base_info(row, self._tensor_count(session, row))

    @staticmethod
    def _tensor_count(session: Session, row: BaseModelRow) -> int:
        return session.scalar(select(func.count()).where(BaseTensorRow.base_id == row.id)) or 0

    def list_adapters(
        self,
        limit: int,
        cursor: str | None,
        *,
        namespace: str | None = None,
        kind: str | None = None,
        base: str | None = None,
        words: tuple[str, ...] = (),
    ) -> Page[VersionInfo]:
        """The latest version of each adapter that passes the filters; the cursor is the last full name seen.

        base: a registered name or a fingerprint. words: each must occur in the search text.
        """
        limit = max(1, min(limit, MAX_PAGE))
        order = func.row_number().over(partition_by=VersionRow.adapter_id, order_by=LATEST).label("place")
        ranked = select(VersionRow.id, order).subquery()
        query = (
            select(VersionRow)
            .join(ranked, and_(ranked.c.id == VersionRow.id, ranked.c.place == 1))
            .join(AdapterRow, AdapterRow.id == VersionRow.adapter_id)
            .options(selectinload(VersionRow.files))
            .order_by(AdapterRow.namespace, AdapterRow.name)
            .limit(limit + 1)
        )
        with session_scope(self._engine) as session:
            if namespace:
                query = query.where(AdapterRow.namespace == namespace)
            if kind:
                query = query.where(VersionRow.kind == kind)
            if base:
                query = query.where(VersionRow.base_fingerprint == find_base(session, base).fingerprint)
            if cursor:
                query = query.where(tuple_(AdapterRow.namespace, AdapterRow.name) > tuple_(*adapter_name(cursor)))
            for word in words:
                query = query.where(VersionRow.search_text.contains(word.lower(), autoescape=True))
            rows = list(session.scalars(query))
            items = tuple(version_info(session, row) for row in rows[:limit])
        return Page(items=items, next=items[-1].name if len(rows) > limit else None)

    def get_version(self, ref: str, version: str | None) -> VersionInfo:
        """One version."""
        with session_scope(self._engine) as session:
            return version_info(session, find_version(session, ref, version))

    def list_versions(self, name: str) -> tuple[VersionInfo, ...]:
        """All versions, newest first."""
        with session_scope(self._engine) as session:
            adapter_id = find_version(session, name, None).adapter_id
            rows = session.scalars(
                select(VersionRow).where(VersionRow.adapter_id == adapter_id).order_by(VersionRow.sort_key.desc())
            )
            return tuple(version_info(session, row) for row in rows)

    def set_alias(self, ref: str, version: str | None, alias: str) -> VersionInfo:
        """Create or move an alias."""
        alias_name(alias)
        with session_scope(self._engine, writes=True) as session:
            row = find_version(session, ref, version)
            pointer = session.get(AliasRow, (row.adapter_id, alias))
            if pointer is None:
                session.add(AliasRow(adapter_id=row.adapter_id, alias=alias, version_id=row.id))
            else:
                pointer.version_id, pointer.updated_at = row.id, now()
            session.flush()
            return version_info(session, row)

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias. Raises VersionNotFoundError when there is none."""
        alias_name(alias)
        with session_scope(self._engine, writes=True) as session:
            row = find_version(session, name, None)
            pointer = session.get(AliasRow, (row.adapter_id, alias))
            if pointer is None:
                raise VersionNotFoundError(
                    f"{row.adapter.full_name} has no alias {alias!r}",
                    expected="an alias",
                    found=alias,
                    remedy=f"see 'registry versions {row.adapter.full_name}'",
                )
            session.delete(pointer)

    def compatible(self, base: str, level: Level) -> tuple[CompatibleAdapter, ...]:
        """Latest versions that fit a base, best first, then by name."""
        with session_scope(self._engine) as session:
            facts = base_facts(session, find_base(session, base))
            order = func.row_number().over(partition_by=VersionRow.adapter_id, order_by=LATEST).label("place")
            ranked = select(VersionRow.id, order).subquery()
            rows = session.scalars(
                select(VersionRow)
                .join(ranked, and_(ranked.c.id == VersionRow.id, ranked.c.place == 1))
                .options(selectinload(VersionRow.files), selectinload(VersionRow.targets))
            )
            fits = [(row, version_verdict(session, row, facts)) for row in rows]
            kept = [(row, verdict) for row, verdict in fits if better_or_equal(verdict.level, level)]
            kept.sort(key=lambda fit: (list(Level).index(fit[1].level), fit[0].adapter.full_name))
            return tuple(CompatibleAdapter(adapter=version_info(session, row), verdict=v) for row, v in kept)

    def bases_for(self, ref: str, version: str | None, level: Level) -> tuple[BaseFit, ...]:
        """Registered bases that a version fits, best first, then by name."""
        with session_scope(self._engine) as session:
            row = find_version(session, ref, version)
            fits = []
            for base in session.scalars(select(BaseModelRow)):
                verdict = version_verdict(session, row, base_facts(session, base))
                if better_or_equal(verdict.level, level):
                    fits.append(BaseFit(base=base_info(base, self._tensor_count(session, base)), verdict=verdict))
        return tuple(sorted(fits, key=lambda fit: (list(Level).index(fit.verdict.level), fit.base.name)))
